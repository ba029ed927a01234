"""Frames on a Unix stream socket: four bytes of length (little-endian), then that much msgpack.

`FrameReader` and `frame` are the format itself, for any stream of bytes. `Channel` is the blocking side, `Listener`
accepts, `AsyncChannel` is the asyncio side: it hands every message to a callback in the turn of the loop that read
it, without waking a task. Types are checked while decoding: a peer that sends anything else gets a `ChannelError`,
never an object of a kind that was not asked for.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import msgspec

MAX_FRAME_BYTES = 64 << 20
"""The largest frame that is read; a prompt of a million tokens takes 5 MB."""

_HEADER_BYTES = 4
_READ_BYTES = 256 << 10
_RETRY_S = 0.02

T = TypeVar("T")


class ChannelError(Exception):
    """The peer sent what is not a frame, or not of the type agreed on; the connection is of no more use."""


def frame(encoder: msgspec.msgpack.Encoder, message: object) -> bytearray:
    """`message` with its length before it, ready to be written."""
    buffer = bytearray(_HEADER_BYTES)
    encoder.encode_into(message, buffer, _HEADER_BYTES)
    buffer[:_HEADER_BYTES] = (len(buffer) - _HEADER_BYTES).to_bytes(_HEADER_BYTES, "little")
    return buffer


class FrameReader(Generic[T]):
    """Turns pieces of a byte stream, cut anywhere, into messages of one type.

    `kind` is a type as msgspec takes it: a struct, a union of tagged structs, a list of those.
    """

    def __init__(self, kind: Any, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[T]:
        """Yields the messages that `data` completes, in order; exhaust it. Raises ChannelError at the first bad one."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _HEADER_BYTES:
                size = int.from_bytes(buffer[start : start + _HEADER_BYTES], "little")
                if size > self._max_bytes:
                    raise ChannelError(f"a frame of {size} bytes; at most {self._max_bytes} are read")
                end = start + _HEADER_BYTES + size
                if end > len(buffer):
                    break
                message = self._decode(buffer[start + _HEADER_BYTES : end])
                start = end
                yield message
        finally:
            del buffer[:start]

    @property
    def pending(self) -> int:
        """Bytes of a frame that has begun and is not complete."""
        return len(self._buffer)

    def _decode(self, body: bytearray) -> T:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise ChannelError(f"a frame of {len(body)} bytes that is no message of this version") from error


class Channel(Generic[T]):
    """The blocking end of a connection: sends anything msgspec encodes, receives messages of type `kind`.

    Owns the socket. `BrokenPipeError` and `ConnectionResetError` say that the peer is gone while sending.
    """

    def __init__(self, sock: socket.socket, kind: Any, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._socket = sock
        self._reader: FrameReader[T] = FrameReader(kind, max_bytes)
        self._encoder = msgspec.msgpack.Encoder()
        self._ready: deque[T] = deque()
        self._error: ChannelError | None = None  # raised after what came before it was received

    @classmethod
    def connect(cls, address: str, kind: Any, *, timeout_s: float = 0.0) -> Channel[T]:
        """Connect to the Unix socket at `address`, trying again until `timeout_s` is over. Raises OSError."""
        return cls(connect(address, timeout_s=timeout_s), kind)

    def send(self, message: object) -> None:
        """Write one frame; blocks while the peer's buffer is full."""
        self._socket.sendall(frame(self._encoder, message))

    def send_bytes(self, data: bytes | bytearray) -> None:
        """Write what `frame` made, so that one encoding serves several peers."""
        self._socket.sendall(data)

    def receive(self) -> T | None:
        """The next message; blocks. None: the peer closed between frames; inside a frame it is a ChannelError."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            data = self._socket.recv(_READ_BYTES)
            if not data:
                if self._reader.pending:
                    raise ChannelError("the connection ended in the middle of a frame")
                return None
            try:
                for message in self._reader.feed(data):
                    self._ready.append(message)
            except ChannelError as error:
                self._error = error
        return self._ready.popleft()

    def set_timeout(self, seconds: float | None) -> None:
        """How long `send` and `receive` wait before they raise TimeoutError; None: for ever."""
        self._socket.settimeout(seconds)

    def fileno(self) -> int:
        """For `select`. What was read ahead is not seen there: only `receive` knows."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()


class Listener:
    """A Unix socket that only this user may connect to. Takes the path over from a dead process that left it."""

    def __init__(self, address: str, backlog: int = 128) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            Path(address).unlink(missing_ok=True)
            self._socket.bind(address)
            Path(address).chmod(0o600)
            self._socket.listen(backlog)
        except BaseException:
            self._socket.close()
            raise

    def accept(self) -> socket.socket:
        """The next connection; blocks, unless `set_blocking(False)`: then BlockingIOError if there is none."""
        return self._socket.accept()[0]

    def set_blocking(self, blocking: bool) -> None:
        """Whether `accept` waits."""
        self._socket.setblocking(blocking)

    def set_timeout(self, seconds: float | None) -> None:
        """How long `accept` waits before it raises TimeoutError; None: for ever."""
        self._socket.settimeout(seconds)

    def fileno(self) -> int:
        """For `select`: readable when `accept` has one."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening and remove the path. Idempotent."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            Path(self.address).unlink(missing_ok=True)


def connect(address: str, *, timeout_s: float = 0.0) -> socket.socket:
    """A blocking socket connected to the Unix socket at `address`; tries until `timeout_s` is over. Raises OSError."""
    deadline = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(address)
            return sock
        except OSError:
            sock.close()
            if time.monotonic() >= deadline:
                raise
        time.sleep(_RETRY_S)


class AsyncChannel(asyncio.Protocol, Generic[T]):
    """The asyncio end of a connection. Made by `AsyncChannel.open`; used from its event loop only.

    Messages go to `on_message` in the turn of the loop that read them, in order. `on_close(error)` comes once, last:
    error None if either side closed in order, else what went wrong. An exception of `on_message` is a bug and closes
    the channel.
    """

    def __init__(
        self, kind: Any, on_message: Callable[[T], None], on_close: Callable[[Exception | None], None] | None = None
    ) -> None:
        self._reader: FrameReader[T] = FrameReader(kind)
        self._encoder = msgspec.msgpack.Encoder()
        self._on_message, self._on_close = on_message, on_close
        self._transport: asyncio.WriteTransport | None = None
        self._error: Exception | None = None

    @classmethod
    async def open(
        cls,
        address: str,
        kind: Any,
        on_message: Callable[[T], None],
        on_close: Callable[[Exception | None], None] | None = None,
    ) -> AsyncChannel[T]:
        """Connect to the Unix socket at `address`. Raises OSError if nobody listens."""
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(kind, on_message, on_close), address)
        return channel

    def send(self, message: object) -> None:
        """Queue one frame and return at once. Raises ConnectionError if the channel is closed."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the channel is closed")
        self._transport.write(frame(self._encoder, message))

    @property
    def unsent(self) -> int:
        """Bytes that wait for the peer to read."""
        return self._transport.get_write_buffer_size() if self._transport else 0

    @property
    def is_open(self) -> bool:
        """True until either side closes."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Close after what was sent is written; `on_close` follows. Idempotent."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """Called by asyncio: hands on the messages that `data` completes."""
        try:
            for message in self._reader.feed(data):
                self._on_message(message)
        except Exception as error:  # noqa: BLE001 - reported by on_close; the loop must go on
            self._error = error
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio, once."""
        if self._on_close is not None:
            self._on_close(self._error or exc)
