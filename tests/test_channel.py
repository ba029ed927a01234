"""Frames over Unix sockets, for any cut of the stream and any bytes from a peer."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tokenmill.wire.channel import AsyncChannel, Channel, ChannelError, FrameReader, Listener, connect, frame
from tokenmill.wire.messages import (
    Abort,
    EngineInfo,
    FromEngine,
    Output,
    Request,
    SamplingParams,
    Stats,
    StepOutputs,
    StoppingParams,
    ToEngine,
    TokenDetails,
)

ENCODER = msgspec.msgpack.Encoder()
INFO = EngineInfo("model", "float32", "cpu", "torch", 64, 16, 100, 99, 100, 64, 8)
MESSAGES: list[ToEngine] = [
    Request(1 << 62, (1, 2, 3), SamplingParams(0.5, seed=2**64 - 1, logit_bias=((1, -2.5),)), StoppingParams(9), b"x"),
    Abort(7),
]
OUTPUTS = StepOutputs((Output(1, (5,), "stop", (TokenDetails(-0.5, (5, 6), (-0.5, -1.5)),)),), Stats(steps=3))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


@pytest.mark.parametrize("message, kind", [(MESSAGES, list[ToEngine]), (OUTPUTS, FromEngine), (INFO, FromEngine)])
def test_every_message_arrives_as_it_was_sent(
    pair: tuple[socket.socket, socket.socket], message: object, kind: object
) -> None:
    Channel[object](pair[0], kind).send(message)
    assert Channel[object](pair[1], kind).receive() == message


@pytest.mark.parametrize("seed", range(20))
def test_messages_are_the_same_however_the_stream_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    sent = [list(range(rng.randrange(0, 400))) for _ in range(rng.randrange(1, 30))]
    stream = b"".join(frame(ENCODER, message) for message in sent)
    reader: FrameReader[list[int]] = FrameReader(list[int])
    received: list[list[int]] = []
    start = 0
    while start < len(stream):
        size = rng.choice([1, 2, 5, 100, 5000])
        received += reader.feed(stream[start : start + size])
        start += size
    assert received == sent
    assert not reader.pending


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", 3) + b"abc",
        struct.pack("<I", 0),
        struct.pack("<I", 2**32 - 1),
        frame(ENCODER, "a string"),
        frame(ENCODER, [["request", 1]]),
        frame(ENCODER, [["unknown", 1]]),
        frame(ENCODER, [["abort", "one"]]),
        struct.pack("<I", 100_000) + b"\x91" * 100_000,
        struct.pack("<I", 5) + b"\xdd\xff\xff\xff\xff",
    ],
)
def test_what_is_not_a_message_is_an_error(data: bytes) -> None:
    with pytest.raises(ChannelError):
        list(FrameReader[list[ToEngine]](list[ToEngine]).feed(data))


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes_give_messages_or_an_error_but_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    good = bytearray(frame(ENCODER, MESSAGES) * 3)
    for _ in range(rng.randrange(1, 6)):
        good[rng.randrange(len(good))] = rng.randrange(256)
    with contextlib.suppress(ChannelError):
        list(FrameReader[list[ToEngine]](list[ToEngine]).feed(good))


def test_a_frame_beyond_the_limit_is_refused_before_it_is_read() -> None:
    reader: FrameReader[bytes] = FrameReader(bytes, max_bytes=100)
    assert list(reader.feed(frame(ENCODER, b"x" * 90))) == [b"x" * 90]
    with pytest.raises(ChannelError, match="at most 100"):
        list(reader.feed(frame(ENCODER, b"x" * 110)[:4]))


def test_the_end_of_the_stream_is_none_between_frames_and_an_error_within(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    channel: Channel[object] = Channel(pair[1], list[ToEngine])
    data = frame(ENCODER, MESSAGES)
    pair[0].sendall(data + data[:9])
    pair[0].close()
    assert channel.receive() == MESSAGES
    with pytest.raises(ChannelError, match="middle"):
        channel.receive()


def test_what_came_before_nonsense_is_received(pair: tuple[socket.socket, socket.socket]) -> None:
    channel: Channel[object] = Channel(pair[1], list[ToEngine])
    pair[0].sendall(frame(ENCODER, MESSAGES) * 2 + b"\x01\0\0\0\xc1")
    assert [channel.receive(), channel.receive()] == [MESSAGES, MESSAGES]
    for _ in range(2):
        with pytest.raises(ChannelError):
            channel.receive()


def test_closing_between_frames_is_an_end(pair: tuple[socket.socket, socket.socket]) -> None:
    channel: Channel[object] = Channel(pair[1], list[ToEngine])
    pair[0].close()
    assert channel.receive() is None


def test_a_listener_is_for_this_user_only_and_leaves_no_path(run_dir: Path) -> None:
    path = run_dir / "socket"
    listener = Listener(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listener.close()
    listener.close()
    assert not path.exists()


def test_a_listener_takes_over_the_path_of_a_dead_one(run_dir: Path) -> None:
    path = str(run_dir / "socket")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    listener = Listener(path)
    client: Channel[int] = Channel.connect(path, int)
    client.send(3)
    assert Channel[int](listener.accept(), int).receive() == 3
    client.close()
    listener.close()


def test_connecting_waits_for_a_listener_that_comes_late(run_dir: Path) -> None:
    path = str(run_dir / "socket")
    with pytest.raises(OSError):
        connect(path)
    timer = threading.Timer(0.1, lambda: listeners.append(Listener(path)))
    listeners: list[Listener] = []
    timer.start()
    connect(path, timeout_s=10).close()
    timer.join()
    listeners[0].close()


class Peer:
    """Recorder of the calls of an AsyncChannel."""

    def __init__(self) -> None:
        self.messages: list[object] = []
        self.closed: list[Exception | None] = []
        self.changed = asyncio.Event()

    def on_message(self, message: object) -> None:
        self.messages.append(message)
        self.changed.set()

    def on_close(self, error: Exception | None) -> None:
        self.closed.append(error)
        self.changed.set()

    async def until(self, what: str, count: int) -> None:
        async with asyncio.timeout(10):
            while len(getattr(self, what)) < count:
                self.changed.clear()
                await self.changed.wait()


def test_the_asyncio_side_talks_to_the_blocking_one(run_dir: Path) -> None:
    listener = Listener(str(run_dir / "socket"))

    async def scenario() -> None:
        peer = Peer()
        channel: AsyncChannel[object] = await AsyncChannel.open(
            listener.address, FromEngine, peer.on_message, peer.on_close
        )
        other: Channel[object] = Channel(listener.accept(), list[ToEngine])
        other.send(INFO)
        await asyncio.to_thread(lambda: [other.send(OUTPUTS) for _ in range(300)])
        channel.send(MESSAGES)
        await peer.until("messages", 301)
        assert peer.messages == [INFO] + [OUTPUTS] * 300
        assert await asyncio.to_thread(other.receive) == MESSAGES
        assert channel.is_open
        other.close()
        await peer.until("closed", 1)
        assert peer.closed == [None]
        assert not channel.is_open
        with pytest.raises(ConnectionError):
            channel.send(MESSAGES)

    asyncio.run(scenario())
    listener.close()


def test_the_asyncio_side_closes_after_what_it_sent(run_dir: Path) -> None:
    listener = Listener(str(run_dir / "socket"))

    async def scenario() -> None:
        peer = Peer()
        channel: AsyncChannel[object] = await AsyncChannel.open(
            listener.address, FromEngine, peer.on_message, peer.on_close
        )
        other: Channel[list[int]] = Channel(listener.accept(), list[int])
        message = list(range(500_000))
        channel.send(message)
        assert channel.unsent > 0
        channel.close()
        assert await asyncio.to_thread(other.receive) == message
        assert await asyncio.to_thread(other.receive) is None
        await peer.until("closed", 1)
        assert peer.closed == [None]

    asyncio.run(scenario())
    listener.close()


@pytest.mark.parametrize("data", [b"\x03\0\0\0abc", b"\xff\xff\xff\xff"])
def test_the_asyncio_side_closes_at_nonsense_and_says_why(run_dir: Path, data: bytes) -> None:
    listener = Listener(str(run_dir / "socket"))

    async def scenario() -> None:
        peer = Peer()
        await AsyncChannel[object].open(listener.address, FromEngine, peer.on_message, peer.on_close)
        with listener.accept() as other:
            other.sendall(frame(ENCODER, INFO) + data)
            await peer.until("closed", 1)
        assert peer.messages == [INFO]
        assert isinstance(peer.closed[0], ChannelError)

    asyncio.run(scenario())
    listener.close()


def test_reading_many_small_frames_is_linear() -> None:
    small = bytes(frame(ENCODER, [1]))
    began = time.perf_counter()
    reader: FrameReader[list[int]] = FrameReader(list[int])
    assert len(list(reader.feed(small * 100_000))) == 100_000
    assert time.perf_counter() - began < 5
