"""Lowering of an encoder and a decoder (`program/encoded.py`) to rows of the step table.

All attention goes through the pages of the decoder's cache. While the encoder runs, the positions of the input in the
first layer's pages hold the keys and values of the encoder's current layer. Afterwards `StoreInput` writes those of
cross-attention there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.layout import Fields, Lowered, float_bits
from tokenmill.backends.cpu.memory import AttentionShape
from tokenmill.program.encoded import (
    CrossAttention,
    DecoderAttention,
    EncoderAttention,
    InputIds,
    StoreInput,
    buckets_of,
)
from tokenmill.program.ops import Op, Weight

if TYPE_CHECKING:
    from tokenmill.backends.cpu.memory import Memory

_BIASED = EncoderAttention | DecoderAttention
_VECTOR = 16


def refused(op: Op) -> str:
    """Return why the kernels cannot run an operation of an encoder or decoder; "" if they can, or for another one."""
    if isinstance(op, _BIASED | CrossAttention) and op.head_dim % _VECTOR:
        return f"its attention is for heads of a multiple of {_VECTOR} columns, not {op.head_dim}"
    return ""


def constants(op: Op) -> list[Weight]:
    """Return the matrices whose numbers lowering reads, so they are not packed for products."""
    return [op.bias] if isinstance(op, _BIASED) else []


def input_ids(memory: Memory, op: InputIds) -> Lowered:
    """Return no row: a lookup of a table reads ids by slot and position, in a run of the encoder as in a step."""
    return []


def biased_attention(memory: Memory, op: EncoderAttention | DecoderAttention) -> Lowered:
    """Return the rows that write keys and values and attend with a bias by distance."""
    shape = AttentionShape.of(op, memory.sizes.kv_dtype)
    both, longest, context = isinstance(op, EncoderAttention), op.longest, memory.sizes.context
    # Distances of a key from a query. Of the last page, keys behind the sequence are looked up too, then masked.
    distances = np.arange(-context, -(-context // layout.BLOCK + 1) * layout.BLOCK)

    def by_distance() -> NDArray[np.float32]:
        table = memory.numbers(op.bias)
        return np.ascontiguousarray(table[buckets_of(distances, len(table), longest, both_sides=both)].T)

    fields = _written(memory, op) | {
        layout.X: memory.place(op.q).address,
        layout.WIDTH: shape.count,
        layout.ATTENTION_SCALE: float_bits(op.scale),
        layout.BIASES: memory.array((op.bias, both, longest), by_distance) + 4 * context,
        layout.BIAS_STRIDE: 4 * len(distances),
    }
    return [(f"write_{replace(shape, span='').name}", fields), (f"attend_{shape.name}", fields)]


def store_input(memory: Memory, op: StoreInput) -> Lowered:
    """Return the row that writes the keys and values of cross-attention."""
    reader = next(o for o in memory.program.ops if isinstance(o, CrossAttention) and o.layer == op.layer)
    shape = AttentionShape.of(reader, memory.sizes.kv_dtype)
    return [(f"write_{shape.name}", _written(memory, op) | {layout.WIDTH: shape.count})]


def cross_attention(memory: Memory, op: CrossAttention) -> Lowered:
    """Return the row that attends to the input."""
    shape = AttentionShape.of(op, memory.sizes.kv_dtype)
    return [(f"attend_{shape.name}", {layout.WIDTH: shape.count, layout.ATTENTION_SCALE: float_bits(op.scale)})]


def _written(memory: Memory, op: EncoderAttention | DecoderAttention | StoreInput) -> Fields:
    keys, values = memory.place(op.k), memory.place(op.v)
    return {
        layout.KEYS: keys.address,
        layout.KEY_STRIDE: keys.stride,
        layout.VALUES: values.address,
        layout.VALUE_STRIDE: values.stride,
    }


KINDS: dict[type[Op], Callable[..., Lowered]] = {
    InputIds: input_ids,
    EncoderAttention: biased_attention,
    StoreInput: store_input,
    DecoderAttention: biased_attention,
    CrossAttention: cross_attention,
}
