"""Random quantized matrices in the forms that checkpoints have, made without quantizing anything: codes are random."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tokenmill.quant import none
from tokenmill.quant.base import Coded, Piece, Reader
from tokenmill.quant.formats import FORMATS
from tokenmill.weights.checkpoint import Checkpoint

_DRAWN = 1 << 24  # random bytes, of which every matrix is a slice
_EXPERTS = "-experts"


@dataclass(frozen=True, slots=True)
class Kind:
    """Format of codes, rows and columns of a block (0: all), and what is combined with them: "", zero or low."""

    format: str
    group: int
    more: str = ""
    height: int = 1

    @property
    def bits(self) -> float:
        """Bits of a weight in a checkpoint, roughly: the numbers of blocks in 16 bits."""
        numbers = 2 if self.more in ("zero", "low") else 1
        each = self.group * max(1, self.height)
        return FORMATS[self.format].bits + (16 * numbers / each if self.group else 0)


KINDS = {
    "int4": Kind("u4", 128),
    "int4-zero": Kind("u4", 128, "zero"),
    "int4-32": Kind("u4", 32),
    "int4-low": Kind("u4", 32, "low"),
    "int8": Kind("i8", 0),
    "int8-32": Kind("i8", 32),
    "e4m3": Kind("e4m3", 0),
    "e4m3-blocks": Kind("e4m3", 128, height=128),
    "nf4": Kind("nf4", 64),
    "mxfp4": Kind("e2m1", 32),
}
"""Name -> kind. int4: as GPTQ's and AWQ's; int4-low: as GGUF's Q4_K; int8-32: as Q8_0."""


@cache
def _bytes(count: int) -> NDArray[np.uint8]:
    """Return random bytes; a repetition of `_DRAWN` of them."""
    return np.resize(np.random.default_rng(0).integers(0, 256, _DRAWN, np.uint8), count)


def coded(kind: Kind, rows: int, columns: int, name: str = "") -> Coded:
    """Return a matrix, of numbers around 0 of a size of about 0.02. `name`: seed."""
    known, seed = FORMATS[kind.format], zlib.crc32(name.encode())
    packs = known.bits == 4 and columns % 32 == 0
    elements = rows * columns // 2 if packs else rows * columns
    whole, first = _bytes(-(-elements // _DRAWN) * _DRAWN + 4096), seed % 4096
    codes = whole[first : first + elements].reshape((rows, columns // 32, 16) if packs else (rows, columns))
    if kind.format == "e4m3":
        codes = codes & np.uint8(0xBF)  # up to 1.875
    shape = (-(-rows // kind.height) if kind.height else 1, -(-columns // kind.group) if kind.group else 1)
    draw = np.random.default_rng(seed)
    spread = {"i8": 74.0, "u4": 4.6, "e4m3": 0.7, "e2m1": 2.9, "nf4": 0.55}[kind.format]
    scale = ((draw.random(shape, np.float32) + 0.5) * (0.02 / spread)).astype(np.float16 if kind.group else np.float32)
    zero = np.full((1, 1), 8, np.uint8) if kind.format == "u4" and not kind.more else None
    if kind.more == "zero":
        zero = draw.integers(6, 11, shape).astype(np.uint8)
    low = (scale * np.float16(-8)).astype(np.float16) if kind.more == "low" else None
    codes = codes.view(np.int8) if kind.format == "i8" else codes
    return Coded(codes, kind.format, scale, (kind.height, kind.group), zero=zero, low=low)


def kind_of(name: str) -> Kind | None:
    """Return a kind by its name, which may end in "-experts": of their matrices alone."""
    return KINDS.get(name.removesuffix(_EXPERTS))


def bits_of(name: str) -> tuple[float, float]:
    """Return the bits of a weight of products, and of experts."""
    kind = kind_of(name)
    bits = 16.0 if kind is None else kind.bits
    return 16.0 if name.endswith(_EXPERTS) else bits, bits


def reader(name: str) -> Reader:
    """Return the `read` of a kind: matrices are random codes, but for the head, tables and exact ones."""
    kind, experts = kind_of(name), name.endswith(_EXPERTS)
    assert kind is not None

    def read(source: Checkpoint, piece: Piece) -> Coded:
        stored = none.read(source, piece)
        plain = piece.weight.exact or piece.weight.table or piece.name.startswith(("lm_head.", "model.embed_tokens."))
        if len(stored.shape) != 2 or plain or (experts and "experts." not in piece.name):
            return stored
        return coded(kind, *stored.shape, f"{piece.name} {piece.index}")

    return read
