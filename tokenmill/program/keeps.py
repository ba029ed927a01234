"""The cache and the state that an operation keeps between steps."""

from __future__ import annotations

from typing import Literal, NamedTuple


class CachePart(NamedTuple):
    """One tensor of a layer's cache: `heads` rows of `width` elements for every token."""

    name: str  # "key", "value"
    heads: int
    width: int


class CacheSpec(NamedTuple):
    """Per-token cache that an operation keeps between steps, on one rank."""

    layer: int  # unique within a program
    parts: tuple[CachePart, ...]
    window: int = 0  # size of the sliding window in tokens, the row's own included; 0: all tokens

    @property
    def width(self) -> int:
        """Number of elements per token."""
        return sum(part.heads * part.width for part in self.parts)


class StateSpec(NamedTuple):
    """State of fixed size that an operation keeps between steps for each sequence, on one rank."""

    layer: int
    name: str  # unique within a layer
    shape: tuple[int, ...]
    dtype: Literal["float", "float32"]  # float: the backend's compute type

    @property
    def key(self) -> tuple[int, str]:
        """Layer and name, unique within a program."""
        return self.layer, self.name
