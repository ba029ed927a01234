"""Prefixes of tensor names in the checkpoint: `scope / "layers.3" / "mlp"`."""

from __future__ import annotations


class Scope(str):
    """Prefix of tensor names, from which layers form the names of their weights. Reads nothing."""

    __slots__ = ()

    def __truediv__(self, name: str) -> Scope:
        return Scope(f"{self}.{name}" if self else name)
