"""Tensors of transformers that are made of others of a GGUF file: decays, compressed attention, orders of heads."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from tokenmill.weights.gguf_architecture import Fields, Floats, Made, Shape

Rows = NDArray[np.intp]


def _flat(fields: Fields, shapes: Sequence[Shape]) -> Shape:
    return (prod(shapes[0]),)


def _same(fields: Fields, shapes: Sequence[Shape]) -> Shape:
    shape = shapes[0]
    return shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape


def _logarithm(fields: Fields, arrays: Sequence[Floats], layer: int) -> Floats:
    made: Floats = np.log(-arrays[0])
    return made


def flat(source: str) -> Made:
    """Return the vector of all numbers of a matrix."""
    return Made((source,), _flat, numbers=lambda fields, arrays, layer: arrays[0].reshape(-1))


def of_field(name: str) -> Made:
    """Return the vector of one number that a field lists for each layer."""
    return Made(
        (), lambda fields, shapes: (1,),
        numbers=lambda fields, arrays, layer: np.array([fields[name][layer]], np.float32),
    )  # fmt: skip


def of_shape(source: str, dimensions: int) -> Made:
    """Return a vector or matrix that the file has with more dimensions, of one number each."""
    return Made(
        (source,), lambda fields, shapes: _without_ones(shapes[0], dimensions),
        numbers=lambda fields, arrays, layer: arrays[0].reshape(_without_ones(arrays[0].shape, dimensions)),
    )  # fmt: skip


def _without_ones(shape: Shape, dimensions: int) -> Shape:
    found = tuple(size for size in shape if size != 1) if len(shape) > dimensions else shape
    if len(found) != dimensions:
        raise ValueError(f"expected {dimensions} dimensions besides those of one number")
    return found


DECAY = Made(("ssm_a",), _same, numbers=_logarithm)
"""The logarithm of decays, of which the file has the negative numbers themselves"""


def _expanded_shape(fields: Fields, shapes: Sequence[Shape]) -> Shape:
    keys, values = shapes
    if len(keys) != 3 or len(values) != 3 or (keys[0], keys[1]) != (values[0], values[2]):
        raise ValueError("expected (heads, rank, width of a key) and (heads, width of a value, rank)")
    return keys[0] * (keys[2] + values[1]), keys[1]


def _expanded(fields: Fields, arrays: Sequence[Floats], layer: int) -> Floats:
    keys, values = arrays
    return np.concatenate([keys.swapaxes(1, 2), values], 1)


EXPANDED = {
    "model.layers.{}.self_attn.kv_b_proj.weight": Made(
        ("attn_k_b.weight", "attn_v_b.weight"), _expanded_shape, numbers=_expanded)
}  # fmt: skip
"""The matrix that expands compressed rows: of each head, its keys, which the file has transposed, and its values"""


COLUMN_DECAYS = {
    "model.layers.{}.self_attn.A_log": Made(
        ("ssm_a",), _flat, numbers=lambda fields, arrays, layer: np.log(-arrays[0].reshape(-1))),
    **{f"model.layers.{{}}.self_attn.{name}_conv1d.weight": of_shape(f"ssm_conv1d_{name}.weight", 2)
       for name in "qkv"},
}  # fmt: skip
"""Kimi Linear: decays and convolutions, which the file has with more dimensions"""


def _rates(fields: Fields, second: bool) -> Rows:
    groups, heads = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    each = heads // groups
    return np.arange(2 * heads).reshape(groups, 2, each)[:, int(second)].reshape(-1)


def _tiled(fields: Fields, size: int) -> Rows:
    """Return the file's rows of value heads, of `size` rows each, in the order of the key heads that they belong to."""
    groups, heads = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    order = np.arange(heads).reshape(-1, groups).T.reshape(-1)
    return (order[:, None] * size + np.arange(size)).reshape(-1)


def _values(fields: Fields) -> Rows:
    return _tiled(fields, fields["linear_value_head_dim"])


def _heads(fields: Fields) -> Rows:
    return _tiled(fields, 1)


def _convolved(fields: Fields) -> Rows:
    keys = 2 * fields["linear_num_key_heads"] * fields["linear_key_head_dim"]
    return np.concatenate([np.arange(keys), keys + _values(fields)])


def _rows(source: str, rows: object) -> Made:
    return Made((source,), _same, rows=rows)  # type: ignore[arg-type]


def _matrix(fields: Fields, shapes: Sequence[Shape]) -> Shape:
    if len(shapes[0]) != 3 or shapes[0][0] != fields["altup_num_inputs"] - 1:
        raise ValueError(f"expected {fields['altup_num_inputs'] - 1} matrices")
    return shapes[0][1:]


STREAMS = {
    f"model.altup_{theirs}.{{}}.weight": Made(
        (f"altup_{ours}.weight",), _matrix, numbers=lambda fields, arrays, index: arrays[0][index],
        copies=lambda fields: int(fields["altup_num_inputs"]) - 1)
    for theirs, ours in (("projections", "proj"), ("unembed_projections", "unembd_proj"))
}  # fmt: skip
"""Gemma 3n: the projections to and from the streams beside the first one, stacked"""

_DELTA = "model.layers.{}.linear_attn."
GROUPED = {
    f"{_DELTA}A_log": Made(("ssm_a",), _same, numbers=_logarithm),
    f"{_DELTA}in_proj_b.weight": _rows("ssm_ba.weight", lambda fields: _rates(fields, False)),
    f"{_DELTA}in_proj_a.weight": _rows("ssm_ba.weight", lambda fields: _rates(fields, True)),
}
"""Qwen 3 Next: rates and decays in one matrix, by key head"""

TILED = {
    f"{_DELTA}A_log": Made(("ssm_a",), _same, numbers=lambda f, arrays, _: np.log(-arrays[0].reshape(-1))[_heads(f)]),
    f"{_DELTA}dt_bias": _rows("ssm_dt.bias", _heads),
    f"{_DELTA}in_proj_qkv.weight": _rows("attn_qkv.weight", _convolved),
    f"{_DELTA}in_proj_z.weight": _rows("attn_gate.weight", _values),
    f"{_DELTA}in_proj_b.weight": _rows("ssm_beta.weight", _heads),
    f"{_DELTA}in_proj_a.weight": _rows("ssm_alpha.weight", _heads),
    f"{_DELTA}conv1d.weight": _rows("ssm_conv1d.weight", _convolved),
    f"{_DELTA}out_proj.weight": Made(
        ("ssm_out.weight",), _same, numbers=lambda fields, arrays, layer: arrays[0][:, _values(fields)]),
}  # fmt: skip
"""Qwen 3.5: value heads in another order, the first of each key head before the second ones"""
