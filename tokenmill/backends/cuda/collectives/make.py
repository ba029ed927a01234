"""The collective operations of a rank, by what its machine and the group allow."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from tokenmill.backends.cuda.collectives import choice
from tokenmill.backends.cuda.collectives.base import Collectives, Gathering, Needs, Normed, Reduction, Spreading
from tokenmill.backends.cuda.collectives.choice import Limits
from tokenmill.backends.cuda.collectives.host import Host
from tokenmill.backends.cuda.collectives.ipc import IpcMemory, Unshareable
from tokenmill.backends.cuda.collectives.nccl import Nccl
from tokenmill.backends.cuda.collectives.peers import Layout, PeerReduction, Peers
from tokenmill.backends.cuda.device import Device
from tokenmill.errors import MissingPackage, Unsupported
from tokenmill.parallel.group import Group
from tokenmill.program import ops
from tokenmill.program.value import Program

_REPEATS = 20
_STARTING_S = 1800.0  # a rank may compile kernels meanwhile
_SERVING_S = 30.0
_log = logging.getLogger(__name__)


def collectives_of(
    program: Program, rows: dict[str, int], dtype: torch.dtype, group: Group, device: Device, batch_invariant: bool
) -> Collectives:
    """Return the collective operations of this rank. Blocks until all ranks have called it.

    `program`: of one rank. `rows`: of the largest step, by kind. `batch_invariant`: the order of a sum must not depend
    on the number of rows. Raises a StartError if the ranks have no way to reach each other's memory.
    """
    if not device.real:
        return Host(group)
    memory = why = None
    layout = Layout.of(needs_of(program, rows, dtype), group.size)
    try:
        memory = IpcMemory(group, layout.nbytes, device.torch)
    except Unshareable as reason:
        why = str(reason)
        _log.info("No kernels of our own sum over the ranks: %s.", why)
    nccl = None
    if memory is None or not memory.one_card:
        nccl = _library(group, why)
    if memory is None:
        assert nccl is not None
        if batch_invariant and group.size > 2:
            raise Unsupported("deterministic sums", f"over {group.size} ranks by NCCL", (), f"Here, {why}.")
        return cast(Collectives, GpuCollectives(group, None, nccl, None))
    limits = choice.usual(group.size, nccl is not None and not batch_invariant)
    peers = Peers(memory.shared, layout, limits, _STARTING_S)
    made = GpuCollectives(group, peers, nccl, memory)
    if memory.one_card:
        _log.info("Ranks share a GPU, so sums over them are not measured: %s.", limits)
    else:
        peers.limits = made.measure(dtype, nccl if not batch_invariant else None)
    return made


def _library(group: Group, why: str | None) -> Nccl | None:
    """Return NCCL; None if it is missing, which only matters without kernels of our own."""
    try:
        return Nccl(group)
    except OSError as error:
        if why is None:
            return None
        raise MissingPackage(f"Here, {why}: ranks need NCCL, but {error}. pip install nvidia-nccl-cu13") from None


def needs_of(program: Program, rows: dict[str, int], dtype: torch.dtype) -> Needs:
    """Return the largest operands of a program's collective operations."""
    sums = [op for op in program.ops if isinstance(op, ops.AllReduce)]
    gathered = [op for op in program.ops if isinstance(op, ops.Gather)]
    return Needs(
        rows=max(rows["tokens"], rows["inputs"]),
        row_bytes=max((op.x.width for op in sums), default=0) * dtype.itemsize,
        samples=rows["samples"],
        columns=max((op.x.width for op in gathered), default=0),
        item_bytes=dtype.itemsize,
    )


class GpuCollectives:
    """Implements `base.Collectives` by our own kernels, by NCCL, or by either according to size."""

    def __init__(self, group: Group, peers: Peers | None, nccl: Nccl | None, memory: IpcMemory | None) -> None:
        self._group, self.peers, self._nccl, self._memory = group, peers, nccl, memory
        self._first: Peers | Nccl = cast("Peers | Nccl", peers or nccl)

    @property
    def nbytes(self) -> int:
        """See `Collectives`."""
        return self._first.nbytes

    def reduction(self, x: Tensor, out: Tensor, normed: Normed | None = None) -> Reduction:
        """See `Collectives`."""
        if self.peers is None or self._nccl is None:
            return self._first.reduction(x, out, normed)
        row_bytes = x.shape[1] * x.element_size()
        own, library = self.peers.reduction(x, out, normed), self._nccl.reduction(x, out)
        return _BySize(own, library, self.peers, row_bytes)

    def gathering(self, x: Tensor, out: Tensor, first_only: bool) -> Gathering:
        """See `Collectives`."""
        return self._first.gathering(x, out, first_only)

    def spreading(self, chosen: Tensor, tokens: Tensor) -> Spreading:
        """See `Collectives`."""
        return self._first.spreading(chosen, tokens)

    def agree(self, ok: bool) -> bool:
        """See `Collectives`."""
        return bool(self._group.minimum(int(ok)))

    def started(self) -> None:
        """See `Collectives`."""
        self.agree(True)
        if self.peers is not None:
            self.peers.wait_up_to(_SERVING_S)

    @contextlib.contextmanager
    def unlaunched(self) -> Iterator[None]:
        """See `Collectives`."""
        if self._nccl is not None:
            self._nccl.quiet = True
        try:
            yield
        finally:
            if self._nccl is not None:
                self._nccl.quiet = False

    def check(self) -> None:
        """See `Collectives`."""
        if self.peers is not None:
            self.peers.check()

    def close(self) -> None:
        """See `Collectives`."""
        if self._nccl is not None:
            self._nccl.close()
        if self._memory is not None:
            self._memory.close()

    def measure(self, dtype: torch.dtype, nccl: Nccl | None) -> Limits:
        """Return the limits that are best here."""
        peers = self.peers
        assert peers is not None
        most = min(choice.SIZES[-1], peers.layout.tiles.room * peers.layout.tiles.stride * peers.size)
        sizes = [size for size in choice.SIZES if size <= most]
        columns = peers.layout.rows.stride // dtype.itemsize
        rows = max(1, most // peers.layout.rows.stride)
        x = torch.zeros(rows, columns, dtype=dtype, device=peers.counts.device)
        own = PeerReduction(peers, x, torch.empty_like(x), None)

        def rows_of(nbytes: int) -> int:
            return max(1, min(rows, nbytes // peers.layout.rows.stride))

        def one_shot(nbytes: int) -> float | None:
            fits = rows_of(nbytes) <= peers.layout.rows.room
            return _us(lambda: own.one_shot(rows_of(nbytes))) if fits else None

        kernels: dict[str, Callable[[int], float | None]] = {
            "one shot": one_shot,
            "two shots": lambda nbytes: _us(lambda: own.two_shots(rows_of(nbytes))),
        }
        if nccl is not None:
            library = nccl.reduction(x, torch.empty_like(x))
            kernels["NCCL"] = lambda nbytes: _us(lambda: library.run(rows_of(nbytes)))
        return choice.measured(kernels, self._worst, sizes)

    def _worst(self, times: Sequence[float]) -> list[float]:
        given = self._group.exchange(",".join(map(repr, times)).encode())
        return [max(each) for each in zip(*([*map(float, part.decode().split(","))] for part in given), strict=True)]


class _BySize:
    """Implements `base.Reduction`: our kernels for few bytes, the library's for many."""

    def __init__(self, own: PeerReduction, library: Reduction, peers: Peers, row_bytes: int) -> None:
        self._own, self._library, self._peers, self._row_bytes = own, library, peers, row_bytes
        self.norms, self.run_normed = own.norms, own.run_normed

    def run(self, rows: int, early: bool = False) -> None:
        """See `Reduction`."""
        if rows * self._row_bytes <= self._peers.limits.two_shots or self._own.in_one_shot(rows):
            self._own.run(rows, early)
        else:
            self._library.run(rows, early)


def _us(run: Callable[[], None]) -> float:
    """Return the microseconds of a launch in a graph of several, the least of three tries."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_REPEATS):
            run()
    found = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(float(start.elapsed_time(end)) * 1e3 / _REPEATS)
    return min(found)
