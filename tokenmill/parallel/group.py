"""Group of the ranks of an engine: which rank this is, and small messages that all ranks exchange.

It is the control plane: it carries addresses, handles and agreements while an engine starts, and needs no torch.
Tensors travel by transports that the backends make from it, as `gloo.py`. Invariant: all ranks make the same calls in
the same order, each from one thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tokenmill.errors import StartError
from tokenmill.wire.channel import Channel, Listener

JOIN_S = 600.0
"""Time for all ranks to join, in seconds."""


class RanksMissing(StartError):
    """Some ranks of an engine did not join it in time."""

    variant = "ShardCannotStart"

    def __init__(self, missing: Sequence[int], timeout_s: float) -> None:
        which = f"Rank {missing[0]}" if len(missing) == 1 else f"Ranks {', '.join(map(str, missing))}"
        super().__init__(
            f"{which} did not join the engine within {timeout_s:g} s. If they start slowly, raise --rank-timeout; "
            "else their log says what they wait for."
        )


def accept_ranks(listener: Listener, others: dict[int, Channel[bytes]], size: int, timeout_s: float) -> None:
    """Accept the connections of ranks 1 … `size` − 1 that are not in `others` yet, by rank, and add them to it.

    Raise RanksMissing after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while missing := sorted(set(range(1, size)) - set(others)):
        left = max(0.001, deadline - time.monotonic())
        listener.set_timeout(left)
        try:
            channel: Channel[bytes] = Channel(listener.accept(), bytes)
            channel.set_timeout(left)
            rank = channel.receive()
        except TimeoutError:
            raise RanksMissing(missing, timeout_s) from None
        channel.set_timeout(None)
        if rank is not None:
            others[int(rank)] = channel


def connect_rank(rank: int, address: str, kind: Any, timeout_s: float, secret: bytes) -> Channel[Any]:
    """Return a connection to rank 0, which `accept_ranks` accepts. `kind`: of what it sends. Raises OSError."""
    channel: Channel[Any] = Channel.connect(address, kind, timeout_s=timeout_s, secret=secret)
    channel.send(str(rank).encode())
    return channel


class Group:
    """Ranks 0 … `size` − 1 of an engine, or a part of them, seen from rank `rank`.

    `connect` makes a group of more than one rank. A group of one rank needs no connection. `host`: address of this
    machine at which other machines' ranks reach it; "" if all are on one machine. `secret`: of their connections.
    """

    host, secret = "", b""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @staticmethod
    def connect(rank: int, size: int, address: str, timeout_s: float = JOIN_S, secret: bytes = b"") -> Group:
        """Join the other ranks and return the group. Blocks until all have joined.

        `address`, `secret`: of rank 0, as of `Listener`; it listens until then. Raise RanksMissing, with the missing
        ranks, after `timeout_s` seconds.
        """
        if size == 1:
            return Group()
        if rank == 0:
            return _Center(size, address, timeout_s, secret)
        return _Spoke(rank, size, address, timeout_s, secret)

    def exchange(self, data: bytes = b"") -> list[bytes]:
        """Return each rank's `data`, by rank, on every rank. It is a barrier, too.

        Raise ConnectionError, which names the rank, if one has ended.
        """
        if self.size > 1:
            raise RuntimeError("a group of several ranks is made by `connect`")
        return [data]

    def minimum(self, n: int) -> int:
        """Return the minimum of `n` over the ranks."""
        return min(map(int, self.exchange(str(n).encode())))

    def part(self, first: int, size: int) -> Group:
        """Return the group of the ranks `first` … `first` + `size` − 1, to which this one belongs.

        It exchanges through the whole group: ranks outside of it make the same calls, on their own parts.
        """
        return self if size == self.size else _Part(self, first, size)

    def close(self) -> None:
        """Leave the group. Idempotent."""


class _Center(Group):
    """Rank 0, to which all others are connected."""

    def __init__(self, size: int, address: str, timeout_s: float, secret: bytes) -> None:
        super().__init__(0, size)
        self.secret = secret
        self._others: dict[int, Channel[bytes]] = {}
        listener = Listener(address, secret=secret)
        try:
            accept_ranks(listener, self._others, size, timeout_s)
        except RanksMissing:
            self.close()
            raise
        finally:
            listener.close()
        self.host = self._others[1].host

    def exchange(self, data: bytes = b"") -> list[bytes]:
        """See `Group`."""
        found = [data]
        for rank in range(1, self.size):
            received = self._others[rank].receive()
            if received is None:
                raise ConnectionError(f"rank {rank} has ended")
            found.append(received)
        for rank in range(1, self.size):
            self._others[rank].send(found)
        return found

    def close(self) -> None:
        """See `Group`."""
        for channel in self._others.values():
            channel.close()


class _Spoke(Group):
    """Any other rank, connected to rank 0."""

    def __init__(self, rank: int, size: int, address: str, timeout_s: float, secret: bytes) -> None:
        super().__init__(rank, size)
        self.secret = secret
        try:
            self._channel: Channel[list[bytes]] = connect_rank(rank, address, list[bytes], timeout_s, secret)
        except OSError:
            raise RanksMissing([0], timeout_s) from None
        self.host = self._channel.host

    def exchange(self, data: bytes = b"") -> list[bytes]:
        """See `Group`."""
        self._channel.send(data)
        found = self._channel.receive()
        if found is None:
            raise ConnectionError("rank 0 has ended, or left because another rank has")
        return found

    def close(self) -> None:
        """See `Group`."""
        self._channel.close()


class _Part(Group):
    """Some consecutive ranks of a group. The owner of the whole closes it."""

    def __init__(self, whole: Group, first: int, size: int) -> None:
        super().__init__(whole.rank - first, size)
        self._whole, self._first = whole, first
        self.host, self.secret = whole.host, whole.secret

    def exchange(self, data: bytes = b"") -> list[bytes]:
        """See `Group`."""
        return self._whole.exchange(data)[self._first : self._first + self.size]
