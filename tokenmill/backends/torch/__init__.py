"""The reference backend: every kind of operation in a few lines of torch."""

from tokenmill.backends.torch.kind import KIND

__all__ = ["KIND"]
