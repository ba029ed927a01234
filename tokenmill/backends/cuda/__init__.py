"""The backend for NVIDIA GPUs: Triton kernels and cuBLAS, CUDA graphs, nothing of a step waits for the host."""

from tokenmill.backends.cuda.kind import KIND

__all__ = ["KIND"]
