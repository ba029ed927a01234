"""The backend for models that transformers computes, with the attention and the cache of `backends/torch`."""

from tokenmill.backends.transformers.kind import KIND

__all__ = ["KIND"]
