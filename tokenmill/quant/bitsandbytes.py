"""Read bitsandbytes' weights, int8, NF4 or FP4, or make int8 ones while loading.

int8: `weight` has the codes, `SCB` the largest magnitude of each row, which is code 127. Four bits: `weight` has the
codes of the whole matrix one after another, the first of two in the high nibble. Beside it are `weight.absmax`, the
largest magnitude of every `blocksize` codes, `weight.quant_map`, the numbers of the 16 codes, and the rest as JSON in
`weight.quant_state.bitsandbytes__TYPE`. With double quantization, `absmax` has codes of 8 bits: an index into
`nested_quant_map`, times a number of `nested_absmax`, plus `nested_offset`.

llm.int8's exact columns of large activations are not: these weights multiply activations that are not quantized.
"""

from __future__ import annotations

import msgspec
import numpy as np

from tokenmill.errors import ModelError
from tokenmill.quant import _made, none
from tokenmill.quant._beside import FLOATS, Beside, Bytes, Floats, kind_of, misfit, nibble_codes, numbers, scales
from tokenmill.quant._method import Matrix
from tokenmill.quant._settings import described, settings
from tokenmill.quant.base import Piece
from tokenmill.quant.coded import Coded, dense
from tokenmill.quant.formats import FORMATS
from tokenmill.weights.checkpoint import Checkpoint, Stored

WHILE_LOADING = True

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_TABLES = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
_FORMATS = ("nf4", "fp4")
_STORAGE = ("U8", "I8", "F16", "BF16", "F32")  # types in which programs that share parameters store bytes


class Settings(msgspec.Struct):
    """Fields of the checkpoint's description that are read."""

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "fp4"


class State(msgspec.Struct):
    """Content of a matrix's `quant_state`."""

    quant_type: str
    blocksize: int
    shape: list[int]
    nested_blocksize: int = 0
    nested_offset: float = 0.0


def names(source: Checkpoint) -> tuple[str, ...]:
    """Return the values of --quantize that name how the checkpoint is stored."""
    given = settings(source, Settings)
    return (f"bitsandbytes-{given.bnb_4bit_quant_type}",) if given.load_in_4bit else ("bitsandbytes",)


def notes(source: Checkpoint) -> list[str]:
    """Return a note for int8, whose activations are not quantized."""
    told = "bitsandbytes' quantization of activations, int8 but for outliers, is not applied"
    return [] if settings(source, Settings).load_in_4bit else [told]


def matrix(source: Checkpoint, name: str) -> Matrix | None:
    """Return how a weight is stored; see `base`."""
    tensors = Beside(source, name)
    if tensors.names(*_STATES):
        state, _ = _state(tensors)
        return Matrix(tuple(state.shape), (name, *tensors.names(*_STATES, *_TABLES)))
    shape = source.shape(name)
    if shape is None or len(shape) != 2 or source[name].kind not in ("I8", "U8"):
        return None
    if source[name].kind == "U8":
        tensors.need(*_STATES)
    _eight_bit_scale(tensors, shape)
    return Matrix(shape, (name, *tensors.names("SCB", "weight_format")))


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece in its codes, or make int8 codes if the checkpoint is not quantized."""
    if described(source) is None:
        return _made.read_products(source, piece, int8_rows)
    tensors = Beside(source, piece.name)
    if tensors.names(*_STATES):
        return _four_bits(tensors, piece)
    stored = piece.stored(source)
    if stored.kind != "I8":
        return none.dense(stored, piece)
    scale = _eight_bit_scale(tensors, stored.shape)
    whole, block = scales(scale, stored.shape)
    codes = stored.data.view(np.int8)
    return Coded(codes, "i8", whole / np.float32(127), block).take(piece.rows, piece.columns)


def _eight_bit_scale(tensors: Beside, shape: tuple[int, ...]) -> Stored:
    """Return the scales of an int8 matrix. Raises ModelError if they do not fit, or if its layout is another one."""
    scale, layout = tensors.need("SCB"), tensors.find("weight_format")
    kind_of(scale, FLOATS, "scales")
    if tuple(scale.shape) != (shape[0],):
        raise misfit(scale, (shape[0],), f"{tensors.name!r} of shape {shape}")
    if layout is not None and layout.data.any():
        raise ModelError(
            f"{layout.name!r} is {layout.data.reshape(-1)[0]}; only 0, the layout by rows, is supported. Save the "
            "model again with a current bitsandbytes."
        )
    return scale


def _state(tensors: Beside) -> tuple[State, int]:
    """Return a matrix's quant_state and the bytes of its codes. Raises ModelError if the tensors do not fit it."""
    stored, codes = tensors.need(*_STATES), tensors.need("weight")
    kind_of(codes, _STORAGE, "codes of four bits")
    try:
        state = msgspec.json.decode(stored.data.tobytes(), type=State, strict=False)
    except msgspec.DecodeError as error:
        raise ModelError(f"{stored.name!r} is no JSON of a quant_state: {error}. Download the model again.") from None
    if state.quant_type not in _FORMATS or state.blocksize < 1 or len(state.shape) != 2:
        raise ModelError(
            f"{stored.name!r} has quant_type {state.quant_type!r}, blocksize {state.blocksize} and shape "
            f"{state.shape}; supported: nf4 and fp4 of matrices. Save the model again with a current bitsandbytes."
        )
    count = state.shape[0] * state.shape[1]
    if codes.data.size != -(-count // 2):
        raise misfit(codes, f"{-(-count // 2)} bytes", f"a matrix of {state.shape[0]} × {state.shape[1]}")
    blocks, absmax = -(-count // state.blocksize), tensors.need("weight.absmax")
    if absmax.shape != (blocks,):
        raise misfit(absmax, (blocks,), f"{count} codes in blocks of {state.blocksize}")
    if tensors.need("weight.quant_map").shape != (16,):
        raise misfit(tensors.need("weight.quant_map"), (16,), "a code of four bits")
    if absmax.kind == "U8":
        nested = tensors.need("weight.nested_absmax")
        if not state.nested_blocksize or nested.shape != (-(-blocks // state.nested_blocksize),):
            raise misfit(nested, "one number for each block", f"{blocks} scales in blocks of {state.nested_blocksize}")
        if tensors.need("weight.nested_quant_map").shape != (256,):
            raise misfit(tensors.need("weight.nested_quant_map"), (256,), "a code of eight bits")
    return state, count


def _four_bits(tensors: Beside, piece: Piece) -> Coded:
    state, count = _state(tensors)
    rows, columns = state.shape
    codes, table = tensors.need("weight").data.reshape(-1), numbers(tensors.need("weight.quant_map"))
    block, absmax = state.blocksize, _absmax(tensors, state)
    known = next((name for name in _FORMATS if np.allclose(table, _table(name), atol=1e-6)), "")
    if not known or columns % block or columns % 2:  # blocks that belong to two rows, or codes of our own
        spread = np.repeat(absmax, block)[:count]
        flat = np.stack([codes >> np.uint8(4), codes & np.uint8(15)], -1).reshape(-1)[:count]
        return dense((table[flat] * spread).reshape(rows, columns)[piece.rows, piece.columns])
    pairs = codes.reshape(rows, columns // 2)[piece.rows]
    scale = absmax.reshape(rows, columns // block)[piece.rows]
    return Coded(nibble_codes(pairs, high_first=True), known, scale, (1, block)).take(slice(None), piece.columns)


def _absmax(tensors: Beside, state: State) -> Floats:
    """Return the largest magnitudes of blocks, which may be quantized themselves."""
    stored = tensors.need("weight.absmax")
    if stored.kind != "U8":
        return numbers(stored)
    table, outer = (numbers(tensors.need(f"weight.nested_{name}")) for name in ("quant_map", "absmax"))
    inner: Bytes = stored.data.reshape(-1)
    spread = np.repeat(outer, state.nested_blocksize)[: inner.size]
    return np.asarray(table[inner] * spread + np.float32(state.nested_offset), np.float32)


def _table(name: str) -> Floats:
    table = FORMATS[name].table
    assert table is not None
    return table


def int8_rows(x: Floats) -> Coded:
    """Quantize x, (rows, columns), to int8 with a scale for each row, whose largest magnitude becomes 127."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    return Coded(np.rint(x / scale).astype(np.int8), "i8", scale, (1, 0))


def four_bit_blocks(x: Floats, name: str) -> Coded:
    """Quantize x, (rows, blocks, 64), to the nearest numbers of a format, relative to the block's largest magnitude."""
    table = _table(name)
    absmax = np.maximum(np.abs(x).max(-1), np.float32(1e-38))
    order = np.argsort(table, kind="stable")
    bounds = (table[order][1:] + table[order][:-1]) / np.float32(2)
    relative, ranks = x * (np.float32(1) / absmax)[..., None], np.zeros(x.shape, np.uint8)
    for bound in bounds:  # seven times as fast as a search
        ranks += relative > bound
    packed = order.astype(np.uint8)[ranks].reshape(len(x), -1, 2, 16)
    return Coded(packed[:, :, 0] | packed[:, :, 1] << np.uint8(4), name, absmax, (1, x.shape[-1]))
