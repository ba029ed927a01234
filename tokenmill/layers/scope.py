"""A place in the checkpoint's tensor names: `scope / "layers.3" / "mlp"`."""

from __future__ import annotations


class Scope(str):
    """A prefix. Layers name tensors with it; nothing is read."""

    __slots__ = ()

    def __truediv__(self, name: str) -> Scope:
        return Scope(f"{self}.{name}" if self else name)
