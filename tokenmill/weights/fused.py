"""Experts that a checkpoint stores in two tensors of three axes, as transformers 5 holds them in memory.

The models name every expert's matrices. Those of a fused tensor lie one after another in the file, so each is a tensor
of its own in the same bytes. So are the scales of quantized ones (`gate_up_proj_scale_inv`, FP8), if each matrix has
whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

_GATE_UP, _UP, _DOWN = "experts.gate_up_proj", "experts.up_proj", "experts.down_proj"
_MATRICES = {_GATE_UP: ("gate_proj", "up_proj"), _UP: ("up_proj",), _DOWN: ("down_proj",)}
_SCALES = ("_scale_inv", "_scale", "_activation_scale")
"""Suffixes of tensors of scales: of blocks or rows of each matrix, or one for each expert"""
_TURNED = ("qwen3_vl_moe_text",)
"""Model types whose matrices are transposed in some files. Others that have such files read them as they are."""


class Part(NamedTuple):
    """Tensor within a fused one: the elements from `start` on.

    `turned`: (rows, columns, first) of the matrix from `start` on whose columns from `first` on are the tensor's rows;
    None: the tensor lies there as it is.
    """

    name: str
    shape: tuple[int, int]
    start: int
    turned: tuple[int, int, int] | None = None


def parts_of(name: str, shapes: dict[str, tuple[int, ...]], model_type: str = "") -> Iterator[Part]:
    """Return the matrices of the experts that the tensor `name` holds; none if it holds no experts.

    `shapes`: of all tensors.
    """
    scales = next((found for found in _SCALES if name.endswith(found)), "")
    if scales:
        yield from _scales_of(name.removesuffix(scales), scales, shapes, model_type)
        return
    suffix = next((suffix for suffix in _MATRICES if name.endswith(suffix)), "")
    prefix = name.removesuffix(suffix)
    gate_up, up, down = (shapes.get(prefix + suffix, ()) for suffix in _MATRICES)
    if not suffix or len(down) != 3:
        return
    experts, width, inner = down
    turned = False
    if gate_up != (experts, 2 * inner, width) and up != (experts, inner, width):
        inner, width, turned = width, inner, True
        if gate_up != (experts, width, 2 * inner) or model_type not in _TURNED:
            return
    matrices = _MATRICES[suffix]
    shape = (width, inner) if suffix == _DOWN else (inner, width)
    for i in range(experts):
        for j, matrix in enumerate(matrices):
            found = f"{prefix}experts.{i}.{matrix}.weight"
            if turned:
                whole = len(matrices) * prod(shape)
                yield Part(found, shape, i * whole, (shape[1], len(matrices) * shape[0], j * shape[0]))
            else:
                yield Part(found, shape, (i * len(matrices) + j) * prod(shape))


def _scales_of(name: str, scales: str, shapes: dict[str, tuple[int, ...]], model_type: str) -> Iterator[Part]:
    """Return the scales of each matrix of the fused tensor `name`; none if they cannot be divided among them."""
    matrices, shape = list(parts_of(name, shapes, model_type)), shapes[name + scales]
    if not matrices or matrices[0].turned or shape[:1] != shapes[name][:1]:
        return
    together = len(matrices) // shape[0]  # matrices of an expert
    each = prod(shape[1:]) // together if len(shape) == 3 else 1
    if len(shape) not in (1, 3) or (len(shape) == 3 and shape[1] % together):
        return
    for i, matrix in enumerate(matrices):
        start = i * each if len(shape) == 3 else i // together
        own = (shape[1] // together, shape[2]) if len(shape) == 3 else (1, 1)
        tensor = scales.removeprefix("_") if len(shape) == 1 and "activation" in scales else f"weight{scales}"
        yield Part(matrix.name.removesuffix("weight") + tensor, own, start)
