"""The CPU backend: kernels compiled by numba from LLVM vector code, and a step as a table of them. No torch."""

from tokenmill.backends.cpu.kind import KIND

__all__ = ["KIND"]
