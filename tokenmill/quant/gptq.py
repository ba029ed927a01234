"""Read GPTQ checkpoints, as AutoGPTQ and GPTQModel write them: codes of 2, 3, 4 or 8 bits in groups of inputs.

A matrix is `qweight` (words of inputs, outputs), with codes packed along the inputs, `scales` (groups, outputs),
`qzeros` (groups, words of outputs) and, with act-order, `g_idx`: the group of each input. The number of a code is
scale · (code − zero). The first format stores zero − 1, `gptq_v2` stores the zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ModelError
from tokenmill.quant import none
from tokenmill.quant._modules import override
from tokenmill.quant._packed import (
    FLOATS,
    INTEGERS,
    coded,
    floats,
    groups_of,
    nibbles_of,
    nibbles_of_rows,
    require,
    rows_of,
    unpack,
    words,
)
from tokenmill.quant._settings import described, misfits, settings
from tokenmill.quant.base import Coded, Matrix, Piece
from tokenmill.quant.formats import PACKED
from tokenmill.weights.checkpoint import Checkpoint

_BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2", "marlin")
_CURE = "Serve a checkpoint of the model in another format: GPTQ of 4 bits, AWQ, FP8 or GGUF."


class Gptq(msgspec.Struct, frozen=True):
    """Fields of the configuration."""

    bits: int
    group_size: int = 128
    desc_act: bool = False
    checkpoint_format: str = ""
    format: str = ""  # its name in newer versions of GPTQModel
    is_marlin_format: bool = False  # its name in older versions of AutoGPTQ
    pack_dtype: str = "int32"
    dynamic: dict[str, dict[str, Any]] = {}


class Form(NamedTuple):
    """Form of one matrix."""

    bits: int
    group: int  # inputs of a group; 0: all
    less: int  # what the stored zeros lack
    act_order: bool
    place: str  # for messages

    def __str__(self) -> str:
        return f"`bits` {self.bits} with `group_size` {self.group or -1} of {self.place}"


def names(source: Checkpoint) -> tuple[str, ...]:
    """Return the names by which `--quantize` may name what is stored."""
    return ("gptq", "marlin") if _in_marlin(source) else ("gptq",)


def matrix(source: Checkpoint, name: str) -> Matrix | None:
    """Find a matrix; see `base`. ModelError if the configuration or a tensor does not fit."""
    module = name.removesuffix(".weight")
    if _in_marlin(source):
        from tokenmill.quant import marlin

        return marlin.matrix(source, name)
    packed = source.shape(f"{module}.qweight")
    if packed is None or module == name:
        return None
    form = form_of(source, module)
    require(source, f"{module}.qweight", INTEGERS, (packed[0], packed[-1]), "a GPTQ matrix")
    (inputs, odd), outputs = divmod(packed[0] * 32, form.bits), packed[1]
    index = source.shape(f"{module}.g_idx")
    if odd or (index is not None and index != (inputs,)):
        given = f"{index[0]} inputs" if index else "a whole number of them"
        raise ModelError(
            f"The tensor '{module}.qweight' has shape {packed}: {inputs} inputs by {form}, but '{module}.g_idx' has "
            f"{given}. Set `bits` to what the weights were quantized to."
        )
    groups = -(-inputs // form.group) if form.group else 1
    require(source, f"{module}.scales", FLOATS, (groups, outputs), str(form))
    require(source, f"{module}.qzeros", INTEGERS, (groups, -(-outputs * form.bits // 32)), str(form))
    if form.act_order or index is not None:
        why = f"`desc_act` of {form.place}" if form.act_order else str(form)
        require(source, f"{module}.g_idx", ("I32", "I64"), (inputs,), why)
    tensors = [f"{module}.qweight", f"{module}.scales", f"{module}.qzeros", *([f"{module}.g_idx"] if index else [])]
    return Matrix((outputs, inputs), tuple(tensors), str(form))


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a part of a matrix; other tensors as stored."""
    if _in_marlin(source):
        from tokenmill.quant import marlin

        return marlin.read(source, piece)
    module = piece.name.removesuffix(".weight")
    if not piece.weight.columns or module == piece.name or source.shape(f"{module}.qweight") is None:
        return none.read(source, piece)
    form = form_of(source, module)
    packed = words(source, f"{module}.qweight")[:, piece.rows]
    scales = floats(source, f"{module}.scales")[:, piece.rows].T
    zeros = _zeros(source, module, form)[piece.rows]
    inputs = packed.shape[0] * 32 // form.bits
    order, of_block, size = _order(source, module, form, inputs, scales.shape[1])
    if not np.array_equal(of_block, np.arange(scales.shape[1])):
        scales, zeros = scales[:, of_block], zeros[:, of_block]
    if form.bits == 4 and inputs % PACKED == 0:
        codes = nibbles_of(packed) if order is None else nibbles_of_rows(rows_of(packed)[order])
    else:
        codes = unpack(packed.T, form.bits)
        codes = codes if order is None else np.take(codes, order, 1)
    return coded(codes, form.bits, scales, zeros, size, order).take(slice(None), piece.columns)


def _zeros(source: Checkpoint, module: str, form: Form) -> NDArray[np.int16]:
    """Return the zeros, (outputs, groups).

    GPTQModel makes the first format by subtracting one from every code of a word at once, with borrows, so a zero of 0
    needs the addition of whole words. Codes of three bits, which run on from word to word, have no borrows.
    """
    stored, last = words(source, f"{module}.qzeros"), (1 << form.bits) - 1
    if form.less and form.bits != 3:
        stored = stored + np.uint32(0xFFFFFFFF // last)
    zeros = unpack(stored, form.bits).T
    if form.less and form.bits == 3:
        zeros = zeros + np.uint8(1) & np.uint8(last)
    return zeros.astype(np.int16)


def _order(
    source: Checkpoint, module: str, form: Form, inputs: int, groups: int
) -> tuple[NDArray[np.intp] | None, NDArray[np.intp], int]:
    """Return the order of the inputs by group, as `groups_of`. ModelError if `g_idx` has a group that is not there."""
    name = f"{module}.g_idx"
    if source.shape(name) is None:
        return None, np.arange(groups), form.group
    stored = source[name]
    raw = np.ascontiguousarray(stored.data)
    index = (raw.view(np.int64) if stored.kind == "I64" else raw.view(np.int32)).reshape(-1)
    if index.min() < 0 or index.max() >= groups:
        wrong = int(index.min() if index.min() < 0 else index.max())
        raise ModelError(
            f"The tensor {name!r} names group {wrong}; '{module}.scales' has groups 0 to {groups - 1}. Download the "
            "model again, or quantize it again."
        )
    return groups_of(index, form.group or inputs)


def form_of(source: Checkpoint, module: str) -> Form:
    """Return the form of a module's matrix. ModelError if the configuration has a value that is not supported."""
    base, found = _checked(source), described(source)
    own = override(module, base.dynamic) or {}
    bits, group = own.get("bits", base.bits), own.get("group_size", base.group_size)
    at = f"dynamic of {module}: " if own else ""
    if bits not in _BITS or isinstance(bits, bool):
        raise misfits(source, f"{at}bits", bits, _BITS, _CURE)
    if type(group) is not int or not (group == -1 or group > 0):
        raise misfits(source, f"{at}group_size", group, ("-1", "a positive number"), _CURE)
    act_order = bool(own.get("desc_act", base.desc_act))
    return Form(bits, max(group, 0), 0 if _format(base) == "gptq_v2" else 1, act_order, found.place if found else "")


def _format(base: Gptq) -> str:
    return "marlin" if base.is_marlin_format else base.checkpoint_format or base.format or "gptq"


def _in_marlin(source: Checkpoint) -> bool:
    return _format(_checked(source)) == "marlin"


def _checked(source: Checkpoint) -> Gptq:
    base = settings(source, Gptq)
    if _format(base) not in _FORMATS:
        key = "checkpoint_format" if base.checkpoint_format else "format"
        raise misfits(source, key, _format(base), _FORMATS, _CURE)
    if base.pack_dtype.removeprefix("torch.") != "int32":
        raise misfits(source, "pack_dtype", base.pack_dtype, ("int32",), _CURE)
    return base
