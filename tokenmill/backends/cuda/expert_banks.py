"""Matrices of a layer's experts on the device that stay quantized, one behind the other."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenmill.backends.cuda.products.coded import CodedMatrix, Lookup
from tokenmill.backends.cuda.products.forms import ROWS, Form, Unpackable
from tokenmill.backends.cuda.products.pack import Upload, packed
from tokenmill.program import ops
from tokenmill.program.ops import Weight
from tokenmill.program.value import Program
from tokenmill.quant.base import Coded, stack

_log = logging.getLogger(__name__)
_AT_ONCE = 1 << 25  # numbers of experts that are packed together, with as few launches as one
_OTHERS = "others of its layer are not quantized"

NO_CODES: dict[str, Any] = {
    "KIND": "",
    "META": "",
    "G": 0,
    "SL": 0,
    "HEIGHT": 0,
    "TEXT": "",
    "ORDER": False,
    "ASM": False,
}
"""`CodedStack.constants` of matrices of numbers"""


@dataclass(frozen=True)
class CodedStack:
    """Matrices of a layer's experts in one form, with an expert before each dimension of `CodedMatrix`'s tensors.

    `factors`: float32 (experts,). `order`: int32 (experts, columns); None: columns of codes are those of x.
    """

    form: Form
    codes: Tensor
    meta: Tensor
    factors: Tensor
    lookup: Lookup | None = None
    order: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tensors that kernels read: codes, words or scales, the table, factors, orders."""
        table = self.factors if self.lookup is None else self.lookup.numbers
        return self.codes, self.meta, table, self.factors, self.factors if self.order is None else self.order

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of the kernels that read it."""
        form, text = self.form, "" if self.lookup is None else self.lookup.text
        return {
            "KIND": form.kind, "META": form.meta, "G": form.group, "SL": form.depth, "HEIGHT": self.meta.shape[-1],
            "TEXT": text, "ORDER": self.order is not None, "ASM": self.codes.is_cuda,
        }  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        order = 0 if self.order is None else self.order.nbytes
        return self.codes.nbytes + self.meta.nbytes + self.factors.nbytes + order

    def matrix(self, i: int, shape: tuple[int, int]) -> CodedMatrix:
        """Return the matrix of expert i, without a copy."""
        order = None if self.order is None else self.order[i]
        return CodedMatrix(self.form, shape, self.codes[i], self.meta[i], float(self.factors[i]), self.lookup, order)

    def takes(self, matrix: CodedMatrix) -> bool:
        """Return True if the matrix is held in the same way."""
        texts = ["" if found is None else found.text for found in (self.lookup, matrix.lookup)]
        return (matrix.form, matrix.order is None, texts[0]) == (self.form, self.order is None, texts[1])

    def put(self, first: int, count: int, matrix: CodedMatrix) -> None:
        """Copy the matrices of experts from `first` on, stacked: with more than one, they have whole groups of rows."""
        some = slice(first, first + count)
        self.codes[some] = matrix.codes.view(count, *self.codes.shape[1:])
        if matrix.meta.dim() == 1:
            self.meta[some] = matrix.meta.view(count, -1)
        else:  # (blocks, words, rows of all)
            self.meta[some] = matrix.meta.view(*matrix.meta.shape[:2], count, -1).permute(2, 0, 1, 3)
        self.factors[some] = matrix.factor
        if self.order is not None and matrix.order is not None:
            self.order[first] = matrix.order


def _room(matrix: CodedMatrix, count: int, experts: int) -> CodedStack:
    """Return memory for the matrices of all experts, of which one holds `count`."""
    device, height = matrix.codes.device, matrix.meta.shape[-1] // count

    def empty(like: Tensor, *sizes: int) -> Tensor:
        return torch.empty(experts, *sizes, dtype=like.dtype, device=device)

    codes = empty(matrix.codes, matrix.codes.shape[0] // count, *matrix.codes.shape[1:])
    meta = empty(matrix.meta, *matrix.meta.shape[:-1], height)
    order = None if matrix.order is None else empty(matrix.order, len(matrix.order))
    return CodedStack(matrix.form, codes, meta, torch.empty(experts, device=device), matrix.lookup, order)


def _unpack(matrix: CodedMatrix, out: Tensor) -> None:
    """Write the numbers of a matrix, its columns in the order of x."""
    if matrix.order is None:
        matrix.unpack(out)
    else:
        stored = torch.empty_like(out)
        matrix.unpack(stored)
        out[:, matrix.order.long()] = stored


Stack = Tensor | CodedStack
"""Matrices of experts: (experts, outputs, columns), or coded"""


class Unpacked(NamedTuple):
    """A matrix that is to be written in 16 bits, and its place."""

    weight: Weight
    parts: list[Coded]
    to: Tensor


class Banks:
    """Matrices of experts as they are loaded: coded where all of a bank are quantized in one form, else in 16 bits.

    A bank is a tuple of weights that `ops.Experts` has in one field. Thread-safe for different weights.
    """

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device) -> None:
        found = {ws for op in program.ops if isinstance(op, ops.Experts) for ws in (op.gate_up, op.down)}
        self._place = {w: (ws[0], i) for ws in found for i, w in enumerate(ws)}
        self._banks = {ws[0]: _Bank(ws, dtype, device) for ws in found}

    def __contains__(self, weight: Weight) -> bool:
        return weight in self._place

    def add(self, weight: Weight, parts: list[Coded], upload: Upload) -> list[Unpacked]:
        """Take a matrix of stacked parts. Quantized ones are packed some at a time.

        Return those that the caller writes, if it is not quantized or if no form holds them.
        """
        first, i = self._place[weight]
        return self._banks[first].add(i, parts, upload)

    def rest(self) -> Iterator[Unpacked]:
        """Yield, when all are added, quantized matrices that the caller writes, because others of a bank are not."""
        for bank in self._banks.values():
            yield from bank.rest()

    def finish(self) -> dict[Weight, Stack]:
        """Return the matrices by the first expert's weight. Logs why quantized ones were converted, a line a reason."""
        found = {weight: bank.finish() for weight, bank in self._banks.items()}
        reasons = Counter(reason for bank in self._banks.values() for reason in bank.reasons)
        for reason, count in reasons.items():
            _log.warning("%d quantized matrices of experts are converted to 16 bits: of each, %s.", count, reason)
        return found


class _Bank:
    """Matrices of the experts of one layer."""

    def __init__(self, weights: tuple[Weight, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.reasons: list[str] = []
        self._weights, self._dtype, self._device = weights, dtype, device
        first = weights[0]
        self._shape = first.rows, first.width
        whole = first.rows % ROWS == 0  # else rows of several matrices would share a group
        self._at_once = max(1, _AT_ONCE // (self._shape[0] * self._shape[1])) if whole else 1
        self._coded: CodedStack | None = None
        self._dense: Tensor | None = None
        self._waiting: dict[int, list[Coded]] = {}
        self._packed: set[int] = set()
        self._lock = Lock()

    def add(self, i: int, parts: list[Coded], upload: Upload) -> list[Unpacked]:
        """See `Banks`."""
        if self._dtype.itemsize > 2 or all(part.dense for part in parts):
            return [self._unpacked(i, parts)]
        at_once = 1 if parts[0].order is not None else self._at_once
        group = range(i - i % at_once, min(i - i % at_once + at_once, len(self._weights)))
        with self._lock:
            self._waiting[i] = parts
            if any(other not in self._waiting for other in group):
                return []
            some = [self._waiting.pop(other) for other in group]
        try:
            self._pack(group, some, upload)
        except Unpackable as reason:
            self.reasons += [str(reason)] * len(group)
            return [self._unpacked(other, each) for other, each in zip(group, some, strict=True)]
        return []

    def _pack(self, group: range, some: list[list[Coded]], upload: Upload) -> None:
        parts = [part for each in some for part in each]
        if len({part.layout() for part in parts}) == 1:
            parts = [stack(parts)]
        matrix = packed(parts, upload, self._dtype)
        with self._lock:
            if self._coded is None:
                self._coded = _room(matrix, len(group), len(self._weights))
            if not self._coded.takes(matrix):
                raise Unpackable("the experts of its layer are in several forms")
            self._packed.update(group)
        self._coded.put(group[0], len(group), matrix)

    def _unpacked(self, i: int, parts: list[Coded]) -> Unpacked:
        with self._lock:
            if self._dense is None:
                self._dense = torch.empty(len(self._weights), *self._shape, dtype=self._dtype, device=self._device)
            return Unpacked(self._weights[i], parts, self._dense[i])

    def rest(self) -> Iterator[Unpacked]:
        """See `Banks`."""
        for i, parts in self._waiting.items():
            self.reasons.append(_OTHERS)
            yield self._unpacked(i, parts)

    def finish(self) -> Stack:
        """Return the matrices. Unpacks coded ones if there are others."""
        if self._dense is None:
            assert self._coded is not None
            return self._coded
        if self._coded is not None:
            for i in self._packed:
                _unpack(self._coded.matrix(i, self._shape), self._dense[i])
        self.reasons += [self.reasons[0] if self.reasons else _OTHERS] * len(self._packed)
        return self._dense
