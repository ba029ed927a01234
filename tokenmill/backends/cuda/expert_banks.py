"""Matrices of a layer's experts on the device that stay quantized, one behind the other."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from tokenmill.backends.cuda.products.coded import CodedMatrix, Lookup
from tokenmill.backends.cuda.products.forms import Form, Unpackable
from tokenmill.backends.cuda.products.pack import Upload, packed
from tokenmill.program import ops
from tokenmill.program.ops import Weight
from tokenmill.program.value import Program
from tokenmill.quant.base import Coded

_log = logging.getLogger(__name__)

NO_CODES: dict[str, Any] = {"KIND": "", "META": "", "G": 0, "SL": 0, "HEIGHT": 0, "TEXT": "", "ASM": False}
"""`CodedStack.constants` of matrices of numbers"""


@dataclass(frozen=True)
class CodedStack:
    """Matrices of a layer's experts in one form, with an expert before each dimension of `CodedMatrix`'s tensors.

    `factors`: float32 (experts,).
    """

    form: Form
    codes: Tensor
    meta: Tensor
    factors: Tensor
    lookup: Lookup | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tensors that kernels read: codes, words or scales, the table, factors."""
        table = self.factors if self.lookup is None else self.lookup.numbers
        return self.codes, self.meta, table, self.factors

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of the kernels that read it."""
        form, text = self.form, "" if self.lookup is None else self.lookup.text
        return {
            "KIND": form.kind, "META": form.meta, "G": form.group, "SL": form.depth, "HEIGHT": self.meta.shape[-1],
            "TEXT": text, "ASM": self.codes.is_cuda,
        }  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.codes.nbytes + self.meta.nbytes + self.factors.nbytes

    @classmethod
    def like(cls, matrix: CodedMatrix, experts: int) -> CodedStack:
        """Return memory for so many matrices like one."""
        codes, meta = (
            torch.empty(experts, *t.shape, dtype=t.dtype, device=t.device) for t in (matrix.codes, matrix.meta)
        )
        return cls(matrix.form, codes, meta, torch.empty(experts, device=codes.device), matrix.lookup)

    def takes(self, matrix: CodedMatrix) -> bool:
        """Return True if the matrix has the form of these."""
        texts = ["" if found is None else found.text for found in (self.lookup, matrix.lookup)]
        return matrix.form == self.form and texts[0] == texts[1]

    def put(self, i: int, matrix: CodedMatrix) -> None:
        """Copy the matrix of expert i."""
        self.codes[i].copy_(matrix.codes)
        self.meta[i].copy_(matrix.meta)
        self.factors[i] = matrix.factor

    def matrix(self, i: int, shape: tuple[int, int]) -> CodedMatrix:
        """Return the matrix of expert i, without a copy."""
        return CodedMatrix(self.form, shape, self.codes[i], self.meta[i], float(self.factors[i]), self.lookup)


Stack = Tensor | CodedStack
"""Matrices of experts: (experts, outputs, columns), or coded"""


class Banks:
    """Matrices of experts as they are loaded: coded where all of a bank are quantized in one form, else in 16 bits.

    A bank is a tuple of weights that `ops.Experts` has in one field. Thread-safe for different weights.
    """

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device) -> None:
        found = {ws for op in program.ops if isinstance(op, ops.Experts) for ws in (op.gate_up, op.down)}
        self._place = {w: (ws[0], i) for ws in found for i, w in enumerate(ws)}
        self._banks = {ws[0]: _Bank(len(ws), _shape(ws[0]), dtype, device) for ws in found}

    def __contains__(self, weight: Weight) -> bool:
        return weight in self._place

    def add(self, weight: Weight, parts: Sequence[Coded], upload: Upload) -> Tensor | None:
        """Put a matrix of stacked parts to its place if it is quantized and a form holds it.

        Else return the place for its numbers, which the caller writes.
        """
        first, i = self._place[weight]
        return self._banks[first].add(i, parts, upload)

    def finish(self) -> dict[Weight, Stack]:
        """Return the matrices by the first expert's weight. Logs why quantized ones were converted, a line a reason."""
        found = {weight: bank.finish() for weight, bank in self._banks.items()}
        reasons = Counter(reason for bank in self._banks.values() for reason in bank.reasons)
        for reason, count in reasons.items():
            _log.warning("%d quantized matrices of experts are converted to 16 bits: of each, %s.", count, reason)
        return found


def _shape(weight: Weight) -> tuple[int, int]:
    return weight.rows, weight.columns // weight.ranks if weight.shard == "row" else weight.columns


class _Bank:
    """Matrices of the experts of one layer, `shape` each."""

    def __init__(self, experts: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.reasons: list[str] = []
        self._experts, self._shape, self._dtype, self._device = experts, shape, dtype, device
        self._coded: CodedStack | None = None
        self._dense: Tensor | None = None
        self._held: set[int] = set()  # experts in `_coded`
        self._lock = Lock()

    def add(self, i: int, parts: Sequence[Coded], upload: Upload) -> Tensor | None:
        """See `Banks`."""
        if self._dtype.itemsize == 2 and not all(part.dense for part in parts):
            try:
                if any(part.order is not None for part in parts):
                    raise Unpackable("its columns are in an order of their own (act-order)")
                self._hold(i, packed(parts, upload, self._dtype))
            except Unpackable as reason:
                self.reasons.append(str(reason))
            else:
                return None
        with self._lock:
            return self._numbers()[i]

    def _numbers(self) -> Tensor:
        if self._dense is None:
            self._dense = torch.empty(self._experts, *self._shape, dtype=self._dtype, device=self._device)
        return self._dense

    def _hold(self, i: int, matrix: CodedMatrix) -> None:
        with self._lock:
            if self._coded is None:
                self._coded = CodedStack.like(matrix, self._experts)
            if not self._coded.takes(matrix):
                raise Unpackable("the experts of its layer are in several forms")
            self._held.add(i)
        self._coded.put(i, matrix)

    def finish(self) -> Stack:
        """Return the matrices. Unpacks coded ones if there are others."""
        if self._coded is None:
            return self._numbers()
        if self._dense is None:
            return self._coded
        for i in self._held:
            self._coded.matrix(i, self._shape).unpack(self._dense[i])
        self.reasons += [self.reasons[0] if self.reasons else "others of its layer are not quantized"] * len(self._held)
        return self._dense
