"""Collective operations on torch tensors in a CPU's memory, by gloo, for the ranks of a group."""

from __future__ import annotations

import socket
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tokenmill.parallel.group import Group

_LOOPBACK = "127.0.0.1"
_gloo: Any = dist.ProcessGroupGloo  # not by init_process_group, which makes one group a process
_MEET = timedelta(minutes=5)
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
    """Implementation of `Collectives` by gloo, on loopback or the interface of `Group.host`. `join` makes it."""

    def __init__(self, group: Group, store: Any) -> None:
        self.rank, self.size = group.rank, group.size
        options = _gloo._Options()  # the only way to give an interface
        options._devices = [_gloo.create_device(hostname=group.host or _LOOPBACK)]
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
    if any(group.exchange(group.host.encode())):
        return _join_over_network(group)
    meeting = Path(tempfile.mkdtemp(prefix="gloo-")) / "store" if group.rank == 0 else None
    path = group.exchange(str(meeting or "").encode())[0].decode()
    store: Any = dist  # its stubs export no store
    made = Gloo(group, store.FileStore(path, group.size))
    group.exchange()  # all have read the file
    if meeting is not None:
        meeting.unlink(missing_ok=True)
        meeting.parent.rmdir()
    return made


def _join_over_network(group: Group) -> Collectives:
    """Return the collectives of ranks on several machines. They meet at a port of rank 0's host."""
    module: Any = dist  # its stubs export no store
    store, place = None, b""
    if group.rank == 0:
        family = socket.AF_INET6 if ":" in group.host else socket.AF_INET
        with socket.create_server((group.host, 0), family=family) as server:
            port = server.getsockname()[1]
            store = module.TCPStore(
                group.host, port, group.size, True, _MEET, wait_for_workers=False, master_listen_fd=server.detach()
            )
        place = f"{group.host} {port}".encode()
    host, port_text = group.exchange(place)[0].decode().split()
    store = store or module.TCPStore(host, int(port_text), group.size, False, _MEET, wait_for_workers=False)
    made = Gloo(group, store)
    group.exchange()  # all have met
    return made
