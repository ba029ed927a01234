"""Lowering of attention to compressed rows (`ops.LatentAttention`), and its weights.

The cache holds a row for each token: the latent, then the rotated key. The expansion of keys is applied to the queries
and that of values to the results, so all heads attend to this row: its first columns are the value.
"""

from __future__ import annotations

import numpy as np

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.layout import Fields, Lowered, float_bits
from tokenmill.backends.cpu.memory import AttentionShape, Memory
from tokenmill.backends.cpu.pack import Allocate, Packed, pack
from tokenmill.program import ops
from tokenmill.program.ops import Op
from tokenmill.quant.base import Coded, dense

_LANES = 16


def refused(op: Op) -> str:
    """Return why the kernels cannot run an attention to compressed rows; "" if they can, or for another operation."""
    if not isinstance(op, ops.LatentAttention):
        return ""
    if any(width % _LANES for width in (op.latent.width, op.key.width, op.value_dim)):
        widths = f"{op.latent.width}, {op.key.width} and {op.value_dim}"
        return f"its compressed rows, rotated keys and values are of multiples of {_LANES} columns, not {widths}"
    if op.rope is not None and (op.rope.rotary_dim != op.key.width or op.rope.interleaved):
        return "it rotates the shared key wholly, and has no table of rotations in pairs for it"
    return ""


def packed(op: ops.LatentAttention, matrix: Coded, allocate: Allocate) -> tuple[Packed, Packed]:
    """Return the expansion of keys, transposed, and that of values: a matrix for each head, one below the other."""
    codes = matrix.codes if matrix.dense else dense(matrix.floats()).codes
    plain = op.head_dim - op.key.width
    heads = codes.reshape(-1, plain + op.value_dim, op.latent.width)
    keys = np.ascontiguousarray(heads[:, :plain].swapaxes(1, 2)).reshape(-1, plain)
    values = np.ascontiguousarray(heads[:, plain:]).reshape(-1, op.latent.width)
    of_keys, of_values = (pack(dense(of), allocate=allocate) for of in (keys, values))
    return of_keys, of_values


def latent_attention(memory: Memory, op: ops.LatentAttention) -> Lowered:
    """Return rows that make queries and rows of the cache, write the cache, attend, and expand the results."""
    shape = AttentionShape.of(op, memory.sizes.kv_dtype)
    of_keys, of_values = memory.panels(op.expand)
    latent, key, q, out = (memory.place(value) for value in (op.latent, op.key, op.q, op.out))
    rank, rotated = op.latent.width, op.key.width
    kept, plain = rank + rotated, op.head_dim - rotated
    queries = {layout.OUT: memory.rooms.at("queries"), layout.OUT_STRIDE: 4 * shape.heads * kept}
    rows = {layout.KEYS: memory.rooms.at("kept"), layout.KEY_STRIDE: 4 * kept}
    turned = queries | {
        layout.WIDTH: shape.heads,
        layout.KEYS: key.address,
        layout.KEY_STRIDE: key.stride,
        layout.VALUES: latent.address,
        layout.VALUE_STRIDE: latent.stride,
        layout.HEAD_BYTES: 4 * op.head_dim,
        layout.ROTATED_BYTES: 4 * rotated,
        layout.OUT_HEAD_BYTES: 4 * kept,
        layout.LATENT: rows[layout.KEYS],
        layout.LATENT_STRIDE: rows[layout.KEY_STRIDE],
    }
    if op.rope is not None:
        turned |= memory.cos_sin(op.rope).columns | {layout.ROPE_INTERLEAVED: int(op.interleaved)}
    absorbed = _product(of_keys, plain, rank) | queries | {layout.X_STEP: 4 * op.head_dim, layout.OUT_STEP: 4 * kept}
    results = {layout.OUT: memory.rooms.at("results"), layout.OUT_STRIDE: 4 * shape.heads * rank}
    attended = (
        results
        | rows
        | {
            layout.X: queries[layout.OUT],
            layout.X_STRIDE: queries[layout.OUT_STRIDE],
            layout.WIDTH: shape.count,
            layout.VALUES: rows[layout.KEYS],
            layout.VALUE_STRIDE: rows[layout.KEY_STRIDE],
            layout.ATTENTION_SCALE: float_bits(op.scale),
        }
    )
    expanded = _product(of_values, rank, op.value_dim) | {
        layout.X: results[layout.OUT],
        layout.X_STRIDE: results[layout.OUT_STRIDE],
        layout.X_STEP: 4 * rank,
        layout.OUT: out.address,
        layout.OUT_STRIDE: out.stride,
        layout.OUT_STEP: 4 * op.value_dim,
    }
    assert q.scales == 0
    return [
        ("latent", turned),
        (f"heads_{of_keys.form}", absorbed),
        (f"write_{shape.name}", attended),
        (f"attend_{shape.name}", attended),
        (f"heads_{of_values.form}", expanded),
    ]


def _product(panels: Packed, columns: int, outputs: int) -> Fields:
    """Return the columns of a product of each head's `columns` with a matrix of its own."""
    return {
        layout.WIDTH: columns,
        layout.WEIGHT: panels.address,
        layout.PANEL_BYTES: panels.panel_bytes,
        layout.PANELS: panels.count,
        layout.HEAD_PANELS: outputs // _LANES,
        layout.BIAS: 0,
    }
