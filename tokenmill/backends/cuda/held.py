"""Forms in which the device holds the matrices of a program, found before loading: from headers, and from a few rows of
each kind of matrix that the checkpoint has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tokenmill.backends.accounts import ITEM_BYTES, dense_bytes
from tokenmill.backends.cuda.prepare import fused
from tokenmill.backends.cuda.products import fp8
from tokenmill.backends.cuda.products.forms import Form, Unpackable, form_of
from tokenmill.backends.cuda.products.fp8_shapes import BLOCK
from tokenmill.program import ops
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Program
from tokenmill.quant import _made
from tokenmill.quant._method import Find, finder
from tokenmill.quant.base import Coded, Piece, Reader, reader_of
from tokenmill.quant.fp8 import is_made
from tokenmill.weights.checkpoint import Checkpoint

_FACTOR_BYTES = 4  # that an expert's matrix has beside its codes and scales
_SAMPLE = 128  # rows that are read of a matrix: those of a block of scales
_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Held(NamedTuple):
    """Form of a quantized matrix on the device, and its bytes. `form`: None if in FP8, as `products/fp8.py` has it."""

    form: Form | None
    nbytes: int

    def __str__(self) -> str:
        """Return the form as reports name it."""
        return "FP8" if self.form is None else str(self.form)


def packable(program: Program) -> set[Weight]:
    """Return the weights that stay quantized if they are: those of products alone, not of tables that are looked up."""
    products = {op.weight for op in program.ops if isinstance(op, ops.Linear)}
    others = (w for op in program.ops if not isinstance(op, ops.Linear) for ws in op.weights().values() for w in ws)
    return {w for w in products.difference(others) if w.columns and not w.exact}


def held(program: Program, source: Checkpoint, dtype: str, quantize: str = "") -> dict[Weight, Held]:
    """Return the matrices that stay quantized. `program`: fused. `quantize`: the user's option.

    A matrix is taken to be like another one that the checkpoint stores in the same way.
    """
    if dtype not in _TYPES:
        return {}
    found: dict[Weight, Held] = {}
    look = _Look(source, reader_of(source, quantize), dtype, quantize)
    for weight in packable(program):
        if (one := look.at(weight)) is not None:
            found[weight] = one
    for op in (op for op in program.ops if isinstance(op, ops.Experts)):
        for ws in (op.gate_up, op.down):
            if (one := look.at(ws[0], expert=True)) is not None:
                found.update(dict.fromkeys(ws, one._replace(nbytes=one.nbytes + _FACTOR_BYTES)))
    return found


def weight_bytes(program: Program, source: Checkpoint, dtype: str, quantize: str = "") -> int:
    """Return the bytes of a program's weights on the device; ModelError as `quant.base.check`."""
    dense, program = dense_bytes(program, source, dtype), fused(program)
    found = held(program, source, dtype, quantize)
    return dense - sum(weight.size * ITEM_BYTES[dtype] - one.nbytes for weight, one in found.items())


class _Look:
    """Samples of a checkpoint's matrices, each kind once."""

    def __init__(self, source: Checkpoint, read: Reader, dtype: str, quantize: str) -> None:
        self._source, self._read, self._dtype = source, read, _TYPES[dtype]
        self._find: Find = finder(source)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._fp8 = fp8.supports(self._dtype, device)
        self._makes_fp8 = quantize == "fp8" and is_made(source) and self._fp8
        self._seen: dict[tuple[object, ...], tuple[Form | str, tuple[int, int]] | None] = {}

    def at(self, weight: Weight, expert: bool = False) -> Held | None:
        """Return how a matrix is held; None if it is not quantized then. `expert`: it is one of a layer's experts."""
        rows, columns = weight.rows, weight.width
        key = (columns, weight.table, weight.exact, expert, *(self._key(part) for part in weight.parts))
        if key not in self._seen:
            self._seen[key] = self._form(weight, expert)
        found = self._seen[key]
        if found is None:
            return None
        form, block = found
        if isinstance(form, Form):
            return Held(form, form.nbytes(rows, columns))
        scales = -(-rows // block[0]) * (-(-columns // block[1]) if block[1] else 1)
        return Held(None, rows * -(-columns // BLOCK) * BLOCK + 4 * scales)

    def _key(self, part: Part) -> tuple[object, ...]:
        """Return what parts have in common that are stored alike."""
        matrix = self._find(part.name)
        names = (part.name,) if matrix is None else matrix.tensors
        kinds = tuple((self._source[name].kind, self._source.shape(name)) for name in names)
        return "" if matrix is None else matrix.form, *kinds

    def _form(self, weight: Weight, expert: bool) -> tuple[Form | str, tuple[int, int]] | None:
        if self._makes_fp8 and not expert and _made.quantizes(weight) and weight.columns % _made.BLOCK == 0:
            return "FP8", (1, 0)
        parts = [self._sample(weight, part) for part in weight.parts]
        if all(part.dense for part in parts):
            return None
        if (
            self._fp8
            and not expert
            and all(fp8.is_fp8(part) for part in parts)
            and len({part.block[1] for part in parts}) == 1
        ):
            return "FP8", parts[0].block if parts[0].block[1] else (1, 0)
        try:
            return form_of(parts), (1, 0)
        except Unpackable:
            return None

    def _sample(self, weight: Weight, part: Part) -> Coded:
        rows = part.slices(0, min(_SAMPLE, part.rows))[0]
        return self._read(self._source, Piece(part.name, rows, slice(None), weight, part.index, part.below))
