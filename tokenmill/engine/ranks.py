"""Links between rank 0 and the other ranks: rank 0 forwards each step's messages, so all plan the same steps."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tokenmill.engine.engine import Link
from tokenmill.parallel.group import JOIN_S, accept_ranks, connect_rank
from tokenmill.wire.channel import Channel, Listener, frame
from tokenmill.wire.messages import Output, Stats, ToScheduler


class RanksDiverged(RuntimeError):
    """Two ranks planned different steps. This is a bug: the engine must be restarted."""


class FollowerFrame(msgspec.Struct, frozen=True, array_like=True):
    """Frame that rank 0 sends to the other ranks before each step."""

    messages: tuple[ToScheduler, ...]
    plan: bytes = b""  # digest of the previous plan; b"": not compared


class Broadcast:
    """Link around `inner` on rank 0 that sends the messages to the other ranks before it returns them.

    The caller closes `ranks`.
    """

    def __init__(self, inner: Link, ranks: RankServer) -> None:
        self._inner, self._ranks = inner, ranks

    def receive(self, block: bool, plan: bytes = b"") -> Sequence[ToScheduler]:
        """See `engine.Link`. Raise OSError if the connection to another rank is broken."""
        messages = self._inner.receive(block, plan)
        self._ranks.broadcast(FollowerFrame(tuple(messages), plan))
        return messages

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`."""
        self._inner.send(outputs, stats)


class RankServer:
    """Rank 0's connections to the other ranks.

    `address`, `secret`: as of `Listener`. `size`: number of ranks, rank 0 included.
    """

    def __init__(self, address: str, size: int, secret: bytes = b"") -> None:
        self._listener = Listener(address, secret=secret)
        self._size = size
        self._followers: dict[int, Channel[bytes]] = {}
        self._encoder = msgspec.msgpack.Encoder()

    def wait(self, timeout_s: float = JOIN_S) -> None:
        """Wait until every other rank has connected. Raise RanksMissing after `timeout_s` seconds."""
        accept_ranks(self._listener, self._followers, self._size, timeout_s)

    def broadcast(self, message: FollowerFrame) -> None:
        """Send the messages of a step to every follower. Raise OSError if one is gone: the engine must end."""
        data = frame(self._encoder, message)
        for rank in range(1, self._size):
            self._followers[rank].send_bytes(data)

    def close(self) -> None:
        """Close all connections and stop listening. Idempotent."""
        for channel in self._followers.values():
            channel.close()
        self._listener.close()


class Follower:
    """Link of a rank other than 0: receives one frame per step and sends no outputs."""

    def __init__(self, address: str, rank: int, timeout_s: float = JOIN_S, secret: bytes = b"") -> None:
        self._rank = rank
        self._channel: Channel[FollowerFrame] = connect_rank(rank, address, FollowerFrame, timeout_s, secret)

    def receive(self, block: bool, plan: bytes = b"") -> list[ToScheduler]:
        """See `engine.Link`. Always block until the frame of rank 0 arrives.

        Raise ConnectionError if rank 0 is gone, and RanksDiverged if its plan was different.
        """
        message = self._channel.receive()
        if message is None:
            raise ConnectionError("rank 0 has closed the connection")
        if message.plan and plan and message.plan != plan:
            raise RanksDiverged(f"rank {self._rank} planned another step than rank 0")
        return list(message.messages)

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """Do nothing: only rank 0 sends outputs."""

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._channel.close()
