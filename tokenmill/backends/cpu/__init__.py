"""The CPU backend: vector kernels compiled with numba and LLVM, and a step table that calls them. It needs no torch."""

from tokenmill.backends.cpu.kind import KIND

__all__ = ["KIND"]
