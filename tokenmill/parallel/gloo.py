"""Collective operations on torch tensors in a CPU's memory, by gloo, for the ranks of a group."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tokenmill.parallel.group import Group

_gloo: Any = dist.ProcessGroupGloo  # not by init_process_group, which makes one group a process
_TIMEOUT = timedelta(minutes=30)  # ends a collective whose peer died; idle ranks are not in a collective


class Collectives(Protocol):
    """Collective operations of `size` ranks, seen from rank `rank`.

    Invariant: all ranks make the same calls in the same order, each from one thread at a time.
    """

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the ranks, on every rank. `x` is not modified."""

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate the ranks' columns, on every rank: (rows, width) -> (rows, width * size)."""

    def broadcast(self, x: Tensor) -> Tensor:
        """Return rank 0's `x` on every rank. On other ranks, `x` has the same shape and type and is overwritten."""

    def close(self) -> None:
        """Leave. Idempotent."""


class OneRank:
    """Implementation of `Collectives` for a single rank: every operation is the identity."""

    rank, size = 0, 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    gather = broadcast = all_reduce

    def close(self) -> None:
        """Do nothing."""


class Gloo:
    """Implementation of `Collectives` by gloo, on the loopback interface of one machine. `join` makes it."""

    def __init__(self, group: Group, store: Any) -> None:
        self.rank, self.size = group.rank, group.size
        options = _gloo._Options()  # the only way to give an interface
        options._devices = [_gloo.create_device(hostname="127.0.0.1")]
        options._timeout = _TIMEOUT
        self._group = _gloo(store, group.rank, group.size, options)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collectives`."""
        x = x.clone()
        self._group.allreduce([x]).wait()
        return x

    def gather(self, x: Tensor) -> Tensor:
        """See `Collectives`."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._group.allgather([parts], [x]).wait()
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """See `Collectives`."""
        self._group.broadcast([x], dist.BroadcastOptions()).wait()
        return x

    def close(self) -> None:
        """See `Collectives`."""
        self._group = None


def join(group: Group) -> Collectives:
    """Return the collectives of a group's ranks. Blocks until all ranks have called it."""
    if group.size == 1:
        return OneRank()
    meeting = Path(tempfile.mkdtemp(prefix="gloo-")) / "store" if group.rank == 0 else None
    path = group.exchange(str(meeting or "").encode())[0].decode()
    store: Any = dist  # its stubs export no store
    made = Gloo(group, store.FileStore(path, group.size))
    group.exchange()  # all have read the file
    if meeting is not None:
        meeting.unlink(missing_ok=True)
        meeting.parent.rmdir()
    return made
