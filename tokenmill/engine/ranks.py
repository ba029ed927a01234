"""Ranks that follow rank 0: it sends each step's messages on to them, so that all plan the same step."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from tokenmill.engine.engine import Link
from tokenmill.wire.channel import Channel, Listener, frame
from tokenmill.wire.messages import Output, Stats, ToScheduler

_JOIN_S = 600.0


class RanksDiverged(RuntimeError):
    """Two ranks planned different steps. A bug; the engine must be started anew."""


class FollowerFrame(msgspec.Struct, frozen=True, array_like=True):
    """The frame that rank 0 sends the others before each step."""

    messages: tuple[ToScheduler, ...]
    plan: bytes = b""  # digest of the plan before; b"": not compared


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """The first frame of a follower."""

    rank: int


class Broadcast:
    """A link of rank 0 that hands the messages of `inner` to the other ranks before it returns them.

    `ranks` is the caller's to close.
    """

    def __init__(self, inner: Link, ranks: RankServer) -> None:
        self._inner, self._ranks = inner, ranks

    def receive(self, block: bool, plan: bytes = b"") -> Sequence[ToScheduler]:
        """See `engine.Link`. Raises OSError if another rank is gone."""
        messages = self._inner.receive(block, plan)
        self._ranks.broadcast(FollowerFrame(tuple(messages), plan))
        return messages

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`."""
        self._inner.send(outputs, stats)


class RankServer:
    """Rank 0's connections to the other ranks. If one dies, `broadcast` raises OSError: the engine must end."""

    def __init__(self, address: str, size: int) -> None:
        self._listener = Listener(address)
        self._size = size
        self._followers: dict[int, Channel[Hello]] = {}
        self._encoder = msgspec.msgpack.Encoder()

    def wait(self, timeout_s: float = _JOIN_S) -> None:
        """Wait until every other rank has connected. Raises TimeoutError naming those that have not."""
        deadline = time.monotonic() + timeout_s
        while missing := sorted(set(range(1, self._size)) - set(self._followers)):
            left = max(0.001, deadline - time.monotonic())
            self._listener.set_timeout(left)
            try:
                channel: Channel[Hello] = Channel(self._listener.accept(), Hello)
                channel.set_timeout(left)
                hello = channel.receive()
            except TimeoutError:
                raise TimeoutError(f"ranks {missing} did not connect to rank 0 within {timeout_s:.0f} s") from None
            channel.set_timeout(None)
            if hello is not None:
                self._followers[hello.rank] = channel

    def broadcast(self, message: FollowerFrame) -> None:
        """Send the step's messages to every follower."""
        data = frame(self._encoder, message)
        for rank in range(1, self._size):
            self._followers[rank].send_bytes(data)

    def close(self) -> None:
        """Close all. Idempotent."""
        for channel in self._followers.values():
            channel.close()
        self._listener.close()


class Follower:
    """The link of a rank other than 0: reads one frame a step, sends nothing."""

    def __init__(self, address: str, rank: int, timeout_s: float = _JOIN_S) -> None:
        self._rank = rank
        self._channel: Channel[FollowerFrame] = Channel.connect(address, FollowerFrame, timeout_s=timeout_s)
        self._channel.send(Hello(rank))

    def receive(self, block: bool, plan: bytes = b"") -> list[ToScheduler]:
        """See `engine.Link`; always waits for rank 0. ConnectionError: rank 0 is gone. RanksDiverged: plans differ."""
        message = self._channel.receive()
        if message is None:
            raise ConnectionError("rank 0 has closed the connection")
        if message.plan and plan and message.plan != plan:
            raise RanksDiverged(f"rank {self._rank} planned another step than rank 0")
        return list(message.messages)

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """Do nothing: the outputs of rank 0 go to the HTTP workers."""

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._channel.close()
