"""Backends, which run programs: one folder each. The only place of kernels."""
