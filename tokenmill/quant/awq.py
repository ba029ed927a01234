"""Read AWQ checkpoints, as AutoAWQ and GPTQModel write them: codes of 4 bits in groups of inputs.

The number of a code is scale · (code − zero). Version `gemm` has `qweight` (inputs, words of outputs), `qzeros`
(groups, words of outputs) and `scales` (groups, outputs); the codes of a word belong to its outputs 0, 2, 4, 6, 1, 3,
5 and 7. Version `gemv` has `qweight` (outputs, words of inputs), and zeros and scales (outputs, groups), padded.
`marlin` is Marlin's layout under the names of the others.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ModelError
from tokenmill.quant import marlin, none
from tokenmill.quant._packed import FLOATS, INTEGERS, Codes, coded, floats, nibbles_of, require, rows_of, unpack, words
from tokenmill.quant._settings import described, misfits, settings
from tokenmill.quant.base import Coded, Matrix, Piece
from tokenmill.quant.formats import PACKED
from tokenmill.weights.checkpoint import Checkpoint

_VERSIONS = ("gemm", "gemv", "marlin")
_SAME = {"exllama": "gemm", "ipex": "gemm", "gemv_fast": "gemv_fast", "llm-awq": "gemv_fast"}
"""Name of a kernel -> the layout that it reads"""
_CURE = "Serve a checkpoint of the model in version gemm, which AutoAWQ writes by default, or in GPTQ, FP8 or GGUF."
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_EACH = 8  # codes of a word


class Awq(msgspec.Struct, frozen=True):
    """Fields of the configuration, with both names of those that have two."""

    bits: int | None = None
    w_bit: int | None = None
    group_size: int | None = None
    q_group_size: int | None = None
    zero_point: bool = True
    version: str = ""
    checkpoint_format: str = ""
    format: str = ""


class Form(NamedTuple):
    """Form of all matrices."""

    group: int  # inputs of a group; 0: all
    version: Literal["gemm", "gemv", "marlin"]
    place: str

    def __str__(self) -> str:
        return f"version {self.version} with `group_size` {self.group or -1} of {self.place}"


def names(source: Checkpoint) -> tuple[str, ...]:
    """Return the names by which `--quantize` may name what is stored; TGI reads AWQ as gptq, too."""
    return ("awq", "gptq")


def matrix(source: Checkpoint, name: str) -> Matrix | None:
    """Find a matrix; see `base`. ModelError if the configuration or a tensor does not fit."""
    module, form = name.removesuffix(".weight"), form_of(source)
    packed = source.shape(f"{module}.qweight")
    if packed is None or module == name:
        return None
    if form.version == "marlin":
        return marlin.found(source, module, form.group, str(form), marlin.AWQ)
    require(source, f"{module}.qweight", INTEGERS, (packed[0], packed[-1]), "an AWQ matrix")
    inputs, outputs = (packed[0], packed[1] * _EACH) if form.version == "gemm" else (packed[1] * _EACH, packed[0])
    if form.group and inputs % form.group:
        raise ModelError(
            f"The tensor '{module}.qweight' has shape {packed}: {inputs} inputs are no whole groups by {form}. Set "
            "`group_size` and `version` to what the weights were quantized with."
        )
    wide = _groups(inputs, form) if form.version == "gemm" else _EACH * _padded(inputs, form)
    for tensor, kinds, width in ((f"{module}.scales", FLOATS, 1), (f"{module}.qzeros", INTEGERS, _EACH)):
        shape = (wide, outputs // width) if form.version == "gemm" else (outputs, wide // width)
        require(source, tensor, kinds, shape, str(form))
    return Matrix((outputs, inputs), tuple(f"{module}.{part}" for part in ("qweight", "scales", "qzeros")), str(form))


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a part of a matrix; other tensors as stored."""
    module, form = piece.name.removesuffix(".weight"), form_of(source)
    if not piece.weight.columns or module == piece.name or source.shape(f"{module}.qweight") is None:
        return none.read(source, piece)
    if form.version == "marlin":
        return marlin.part(source, piece, module, form.group, marlin.AWQ)
    packed, zeros = words(source, f"{module}.qweight"), words(source, f"{module}.qzeros")
    scales = floats(source, f"{module}.scales")
    if form.version == "gemv":
        rows = packed[piece.rows]
        codes = nibbles_of(rows.T) if rows.shape[1] * _EACH % PACKED == 0 else unpack(rows, 4)
        groups = _groups(packed.shape[1] * _EACH, form)
        zero: NDArray[Any] = unpack(zeros[piece.rows], 4)[:, :groups]
        scale = scales[piece.rows, :groups]
    else:
        codes, zero = _rows(packed, piece.rows), _rows(zeros, piece.rows)
        scale = scales[:, piece.rows].T
    return coded(codes, 4, scale, zero.astype(np.int16), form.group).take(slice(None), piece.columns)


def _rows(packed: NDArray[np.uint32], rows: slice) -> Codes:
    """Unpack some outputs of words of outputs, (n, words) -> (outputs, n)."""
    first, stop, step = rows.indices(packed.shape[1] * _EACH)
    start = first // _EACH
    codes = rows_of(np.ascontiguousarray(packed[:, start : -(-stop // _EACH)].T), _ORDER)
    return codes[first - start * _EACH : stop - start * _EACH : step]


def _groups(inputs: int, form: Form) -> int:
    return inputs // form.group if form.group else 1


def _padded(inputs: int, form: Form) -> int:
    """Return the words of zeros of an output in version `gemv`: whole ones, a multiple of 2 or 4 for small groups."""
    multiple = {64: 2, 32: 4}.get(form.group, 1)
    whole = _EACH * multiple
    return (_groups(inputs, form) + whole - 1) // whole * multiple


def form_of(source: Checkpoint) -> Form:
    """Return the form of all matrices. ModelError if the configuration has a value that is not supported."""
    given, found = settings(source, Awq), described(source)
    bits = given.bits if given.bits is not None else given.w_bit
    group = given.group_size if given.group_size is not None else given.q_group_size
    named = (given.version or given.checkpoint_format or given.format or "gemm").lower()
    version = _SAME.get(named, named)
    if bits != 4:
        raise misfits(source, "bits" if given.w_bit is None else "w_bit", bits, (4,), _CURE)
    if group is None or not (group == -1 or group > 0):
        key = "group_size" if given.q_group_size is None else "q_group_size"
        raise misfits(source, key, group, ("-1", "a positive number"), _CURE)
    if version not in _VERSIONS:
        raise misfits(source, "version", named, _VERSIONS, _CURE)
    place = found.place if found is not None else ""
    return Form(max(group, 0), version, place)  # type: ignore[arg-type]  # one of `_VERSIONS`
