"""Who runs programs, one folder each. The only place of kernels."""
