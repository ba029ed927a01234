"""Experts that a checkpoint stores in two tensors of three axes, as transformers 5 holds them in memory.

The models name every expert's matrices. Those of a fused tensor lie one after another in the file, so each is a tensor
of its own in the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

_GATE_UP, _UP, _DOWN = "experts.gate_up_proj", "experts.up_proj", "experts.down_proj"


class Part(NamedTuple):
    """Tensor within a fused one: elements [start, start + size) of it."""

    name: str
    shape: tuple[int, int]
    start: int


def parts_of(name: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[Part]:
    """Return the matrices of the experts that the tensor `name` holds; none if it holds no experts.

    `shapes`: of all tensors. Tensors that hold transposed matrices are not divided: models read them as they are.
    """
    suffix = next((suffix for suffix in (_GATE_UP, _UP, _DOWN) if name.endswith(suffix)), "")
    prefix = name.removesuffix(suffix)
    gate_up, up, down = (shapes.get(prefix + suffix, ()) for suffix in (_GATE_UP, _UP, _DOWN))
    if not suffix or len(down) != 3:
        return
    experts, width, inner = down
    if gate_up != (experts, 2 * inner, width) and up != (experts, inner, width):
        return
    matrices = {_GATE_UP: ("gate_proj", "up_proj"), _UP: ("up_proj",), _DOWN: ("down_proj",)}[suffix]
    shape = (width, inner) if suffix == _DOWN else (inner, width)
    for i in range(experts):
        for j, matrix in enumerate(matrices):
            yield Part(f"{prefix}experts.{i}.{matrix}.weight", shape, (i * len(matrices) + j) * prod(shape))
