"""Copy weights from a checkpoint to the device: raw bytes of mapped files, through several pinned buffers at a time.

Numbers stored in the computation's dtype are copied as they are. Quantized matrices of products are copied as they are,
too, and packed on the device for its kernels (`products/pack.py`), if it computes in 16 bits. The host converts all
others.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.expert_banks import Banks, Stack
from tokenmill.backends.cuda.held import packable
from tokenmill.backends.cuda.products import fp8
from tokenmill.backends.cuda.products.base import Packed
from tokenmill.backends.cuda.products.dense import Dense
from tokenmill.backends.cuda.products.forms import Unpackable
from tokenmill.backends.cuda.products.pack import packed as pack_matrix
from tokenmill.backends.kind import Report
from tokenmill.backends.torch.pack import to_tensor
from tokenmill.parallel.group import Group
from tokenmill.program import ops
from tokenmill.program.cost import weights_of
from tokenmill.program.encoded import DecoderAttention, EncoderAttention
from tokenmill.program.ops import Weight
from tokenmill.program.value import Program
from tokenmill.quant import _made, none
from tokenmill.quant.base import Coded, Piece, Reader, check, for_each, load, load_parts, loaded, pieces_of
from tokenmill.quant.fp8 import is_made
from tokenmill.weights.checkpoint import Checkpoint, read_ahead

_LANES = 8  # copies at a time: one core fills a pinned buffer slower than the bus empties it
_CHUNK = 32 << 20  # bytes of a pinned buffer
_STORED = {torch.bfloat16: np.uint16, torch.float16: np.float16, torch.float32: np.float32}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """Weights of a program on the device.

    `tensors`: vectors, embedding tables and routers, in the computation's dtype, or float32 where near results decide.
    `matrices`: the weights of products. A table that is the output matrix too is in both, and in memory once. `stacks`:
    weights of a layer's experts, (experts, …) or coded, by the first expert's.
    """

    tensors: dict[Weight, Tensor]
    matrices: dict[Weight, Packed]
    stacks: dict[Weight, Stack] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        own = [packed.nbytes for weight, packed in self.matrices.items() if weight not in self.tensors]
        return sum(own) + sum(held.nbytes for held in (*self.tensors.values(), *self.stacks.values()))


class _Lane:
    """A pinned buffer and its stream."""

    def __init__(self, device: Device) -> None:
        self._device, self.device = device, device.torch
        self._stream = torch.cuda.Stream(device.torch) if device.real else None  # type: ignore[no-untyped-call]
        self._staged = torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True) if device.real else None

    def copy(self, rows: NDArray[np.generic], to: Tensor) -> None:
        """Copy contiguous rows to as many rows of `to`, of the same format. Blocks until the copy is done."""
        target = to.view(torch.uint8).view(-1)
        if self._stream is None or self._staged is None:
            target.copy_(torch.from_numpy(np.ascontiguousarray(rows).view(np.uint8).reshape(-1).copy()))
            return
        at_once = max(1, _CHUNK // max(1, rows[:1].nbytes))
        staged, done = self._staged.numpy(), 0
        read_ahead(rows[:at_once])
        with torch.cuda.stream(self._stream):
            for first in range(0, len(rows), at_once):
                read_ahead(rows[first + at_once : first + 2 * at_once])
                some = rows[first : first + at_once]
                np.copyto(staged[: some.nbytes].view(some.dtype).reshape(some.shape), some)
                target[done : done + some.nbytes].copy_(self._staged[: some.nbytes], non_blocking=True)
                self._stream.synchronize()
                done += some.nbytes

    def upload(self, array: NDArray[Any]) -> Tensor:
        """Return an array on the device. Blocks until the copy is done."""
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        made = torch.empty(array.shape, dtype=dtype, device=self._device.torch)
        if array.size:
            self.copy(array, made)
        return made

    @contextlib.contextmanager
    def queued(self) -> Iterator[None]:
        """Launch what is computed within on the lane's stream, and wait for it at the end."""
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            yield
            if self._stream is not None:
                self._stream.synchronize()

    def copy_transposed(self, columns: NDArray[np.generic], cuts: list[tuple[slice, Tensor]]) -> None:
        """Copy contiguous columns of a matrix, and transpose them on the device. Blocks until the copy is done.

        `cuts`: rows of the matrix, and the tensor (rows, columns) that they are written to.
        """
        at_once = max(1, _CHUNK // max(1, columns[:1].nbytes))
        dtype, device = cuts[0][1].dtype, cuts[0][1].device
        for first in range(0, len(columns), at_once):
            some = columns[first : first + at_once]
            staged = torch.empty(some.shape, dtype=dtype, device=device)
            self.copy(some, staged)
            with self.queued():
                for rows, to in cuts:
                    to[:, first : first + len(some)].copy_(staged[:, rows].t())


def pack(
    program: Program,
    source: Checkpoint,
    read: Reader,
    group: Group,
    dtype: torch.dtype,
    device: Device,
    report: Report | None = None,
    quantize: str = "",
) -> DeviceWeights:
    """Read the weights of a program into the device's memory.

    Raises ModelError if one is missing or of another shape than expected.

    `report` is called from this thread, with bytes of the checkpoint. `quantize`: the user's option, "fp8" of which the
    device carries out itself where it can.
    """
    wanted = weights_of(program)
    check(wanted, source)
    stacks, packed = _stacks(program, dtype, device), dict[Weight, Tensor]()
    for ws, stack in stacks.items():
        packed.update(zip(ws, stack, strict=True))
    exact = {op.correction for op in program.ops if isinstance(op, ops.Route)}
    exact |= {op.bias for op in program.ops if isinstance(op, EncoderAttention | DecoderAttention)}
    makes_fp8 = quantize == "fp8" and is_made(source) and fp8.supports(dtype, device.torch)
    banks = Banks(program, dtype, device.torch)
    products = Products(packable(program) if dtype.itemsize == 2 else set(), dtype, makes_fp8)
    for w in (w for w in wanted if w not in packed and w not in products.packable and w not in banks):
        packed[w] = torch.empty(_shape(w), dtype=torch.float32 if w in exact else dtype, device=device.torch)
    lanes: SimpleQueue[_Lane] = SimpleQueue()
    for _ in range(_LANES):
        lanes.put(_Lane(device))

    def one(weight: Weight) -> None:
        lane = lanes.get()
        try:
            if weight in products.packable:
                products.add(weight, source, read, group.rank, lane)
            elif weight in banks:
                _add(banks, weight, source, read, group.rank, lane)
            else:
                _pack(weight, packed[weight], source, read, group.rank, lane)
        finally:
            lanes.put(lane)

    for_each(wanted, source, one, _LANES, report)
    lane = lanes.get()
    for weight, parts, to in banks.rest():
        _pack(weight, to, source, read, group.rank, lane, parts)
    device.finish()
    products.log()
    multiplied = {op.weight for op in program.ops if isinstance(op, ops.Linear)}
    looked_up = {op.table for op in program.ops if isinstance(op, ops.Embed)}
    stacked = {w for ws in stacks for w in ws}
    return DeviceWeights(
        {w: tensor for w, tensor in packed.items() if (w not in multiplied or w in looked_up) and w not in stacked},
        products.matrices | {w: Dense(packed[w]) for w in multiplied if w in packed},
        banks.finish() | {ws[0]: stack for ws, stack in stacks.items()},
    )


class Products:
    """Matrices of products as they are loaded, each packed if it is quantized and a form holds it.

    `makes_fp8`: read them as stored, and quantize them to FP8.
    """

    def __init__(self, packable: set[Weight], dtype: torch.dtype, makes_fp8: bool = False) -> None:
        self.packable, self.matrices = packable, dict[Weight, Packed]()
        self._dtype, self._converted, self._makes_fp8 = dtype, Counter[str](), makes_fp8

    def add(self, weight: Weight, source: Checkpoint, read: Reader, rank: int, lane: _Lane) -> None:
        """Read a matrix to the device. Thread-safe for different weights."""
        makes = self._makes_fp8 and _made.quantizes(weight) and _shape(weight)[1] % _made.BLOCK == 0
        read = none.read if makes else read
        parts = load_parts(weight, source, read, rank)
        if not all(part.dense for part in parts):
            try:
                with lane.queued():
                    found = fp8.packed(parts, lane.upload, self._dtype, lane.device)
                    self.matrices[weight] = found or pack_matrix(parts, lane.upload, self._dtype)
                return
            except Unpackable as reason:
                self._converted[str(reason)] += 1
        to = torch.empty(_shape(weight), dtype=self._dtype, device=lane.device)
        _pack(weight, to, source, read, rank, lane, None if weight.transposed else parts)
        if makes:
            with lane.queued():
                self.matrices[weight] = fp8.made(to)
        else:
            self.matrices[weight] = Dense(to)

    def log(self) -> None:
        """Log why quantized matrices were converted, a line a reason."""
        for reason, count in self._converted.items():
            name = str(self._dtype).removeprefix("torch.")
            _log.warning("%d quantized matrices are converted to %s: of each, %s.", count, name, reason)


def _add(banks: Banks, weight: Weight, source: Checkpoint, read: Reader, rank: int, lane: _Lane) -> None:
    """Read a matrix of an expert to the device."""
    parts = load_parts(weight, source, read, rank)
    with lane.queued():
        unpacked = banks.add(weight, parts, lane.upload)
    for one, its, to in unpacked:
        _pack(one, to, source, read, rank, lane, None if one.transposed else its)


def _stacks(program: Program, dtype: torch.dtype, device: Device) -> dict[tuple[Weight, ...], Tensor]:
    """Return the memory of the biases of experts, by the weights that share a tensor."""
    found = {ws for op in program.ops if isinstance(op, ops.Experts) for ws in (op.gate_up_bias, op.down_bias) if ws}
    return {ws: torch.empty(len(ws), *_shape(ws[0]), dtype=dtype, device=device.torch) for ws in found}


def _shape(weight: Weight) -> tuple[int, ...]:
    if not weight.columns:
        return (weight.rows,)
    return weight.rows, weight.width


def _pack(
    weight: Weight, to: Tensor, source: Checkpoint, read: Reader, rank: int, lane: _Lane,
    parts: list[Coded] | None = None,
) -> None:  # fmt: skip
    """Write a weight in 16 or 32 bits. `parts`: its matrices in order, if they are read already."""
    if not weight.columns:
        to.copy_(to_tensor(load(weight, source, read, rank), to.dtype))
        return
    first, pieces = 0, [] if parts else pieces_of(weight, rank)
    if weight.transposed and (columns := _columns(pieces, source, read, to.dtype)) is not None:
        ends = np.cumsum([0, *(len(range(*piece.rows.indices(columns.shape[1]))) for piece in pieces)]).tolist()
        lane.copy_transposed(columns, [(p.rows, to[ends[i] : ends[i + 1]]) for i, p in enumerate(pieces)])
        return
    for matrix in parts or (loaded(source, piece, read) for piece in pieces):
        rows = to[first : first + matrix.shape[0]]
        raw = _as_stored(matrix, to.dtype)
        if raw is not None:
            lane.copy(raw, rows)
        else:
            rows.copy_(to_tensor(matrix, to.dtype))
        first += matrix.shape[0]


def _columns(pieces: list[Piece], source: Checkpoint, read: Reader, dtype: torch.dtype) -> NDArray[np.generic] | None:
    """Return the columns of the matrix that all pieces are rows of, contiguous; None if it is not stored like that.

    A host transposes some 100 MB a second with one core, a GPU as fast as it receives them.
    """
    if len({(piece.name, piece.index) for piece in pieces}) > 1 or any(p.zero or p.cut for p in pieces):
        return None
    raw = _as_stored(read(source, replace(pieces[0], rows=slice(None))), dtype)
    return raw.T if raw is not None and raw.T.flags.c_contiguous else None


def _as_stored(matrix: Coded, dtype: torch.dtype) -> NDArray[np.generic] | None:
    """Return the numbers if they are stored in this format, else None."""
    return matrix.codes if matrix.dense and matrix.codes.dtype == _STORED[dtype] else None
