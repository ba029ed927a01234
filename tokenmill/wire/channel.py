"""Send and receive messages over a stream socket, as frames of a four-byte little-endian length and msgpack.

`FrameReader` and `frame` implement the format for any byte stream. `Channel` is the blocking end of a connection,
`Listener` accepts connections, and `AsyncChannel` is the asyncio end. `AsyncChannel` calls back for every message in
the event loop iteration that read it, without waking a task. Types are checked while decoding: anything else than the
expected type raises `ChannelError`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import msgspec

from tokenmill.cluster import tcp_address
from tokenmill.errors import WrongSecret
from tokenmill.wire import tcp
from tokenmill.wire.secret import prove_as_caller, prove_as_listener

MAX_FRAME_BYTES = 64 << 20
"""Limit of a frame that is read; a prompt of a million tokens takes 5 MB."""

_HEADER_BYTES = 4
_READ_BYTES = 256 << 10
_RETRY_S = 0.02

_log = logging.getLogger(__name__)

T = TypeVar("T")


class ChannelError(Exception):
    """Error for received bytes that are not a frame, or not of the expected type. The connection is unusable."""


def frame(encoder: msgspec.msgpack.Encoder, message: object) -> bytearray:
    """Encode `message` as a frame, with its length before it."""
    buffer = bytearray(_HEADER_BYTES)
    encoder.encode_into(message, buffer, _HEADER_BYTES)
    buffer[:_HEADER_BYTES] = (len(buffer) - _HEADER_BYTES).to_bytes(_HEADER_BYTES, "little")
    return buffer


class FrameReader(Generic[T]):
    """Decoder of a byte stream, cut into pieces anywhere, to messages of one type.

    `kind`: a type that msgspec accepts: a struct, a union of tagged structs, or a list of those.
    """

    def __init__(self, kind: Any, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[T]:
        """Yield the messages that `data` completes, in order. The caller must exhaust it. Raises ChannelError."""
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
        """Number of bytes received of an incomplete frame."""
        return len(self._buffer)

    def _decode(self, body: bytearray) -> T:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise ChannelError(f"a frame of {len(body)} bytes that is no message of this version") from error


class Channel(Generic[T]):
    """Blocking end of a connection: sends anything msgspec encodes, receives messages of type `kind`.

    Owns the socket. Sending raises `BrokenPipeError` or `ConnectionResetError` if the peer has closed.
    """

    def __init__(self, sock: socket.socket, kind: Any, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._socket = sock
        self._reader: FrameReader[T] = FrameReader(kind, max_bytes)
        self._encoder = msgspec.msgpack.Encoder()
        self._ready: deque[T] = deque()
        self._error: ChannelError | None = None  # raised after the messages before it were received

    @classmethod
    def connect(cls, address: str, kind: Any, *, timeout_s: float = 0.0, secret: bytes = b"") -> Channel[T]:
        """Connect to `address`, retrying for `timeout_s` seconds. Raises the errors of `connect`."""
        return cls(connect(address, timeout_s=timeout_s, secret=secret), kind)

    def send(self, message: object) -> None:
        """Write one frame; blocks while the peer's buffer is full."""
        self._socket.sendall(frame(self._encoder, message))

    def send_bytes(self, data: bytes | bytearray) -> None:
        """Write a result of `frame`, so that a message for several peers is encoded once."""
        self._socket.sendall(data)

    def receive(self) -> T | None:
        """Return the next message; blocks. None if the peer closed between frames; ChannelError if within a frame."""
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
        """Set the time after which `send` and `receive` raise TimeoutError; None: never."""
        self._socket.settimeout(seconds)

    @property
    def host(self) -> str:
        """Address of this machine that the peer is connected to; "" for a Unix socket."""
        name = self._socket.getsockname()
        return "" if self._socket.family == socket.AF_UNIX else str(name[0])

    def fileno(self) -> int:
        """Return the descriptor, for `select`. Messages that were read ahead do not make it readable."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()


class Listener:
    """Listening socket. `address`: a path, or "tcp://host:port"; port 0 becomes a free one.

    Only this user may connect to a path; the stale socket of a dead process is replaced. Over TCP, only peers that hold
    `secret` are accepted. Raise AddressInUse if a port is taken.
    """

    def __init__(self, address: str, backlog: int = 128, *, secret: bytes = b"") -> None:
        self.address, self._secret, self._is_tcp = address, secret, tcp.is_tcp(address)
        self._socket = tcp.listening(address) if self._is_tcp else socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if not self._is_tcp:
                Path(address).unlink(missing_ok=True)
                self._socket.bind(address)
                Path(address).chmod(0o600)
            self._socket.listen(backlog)
            if self._is_tcp:
                self.address = tcp_address(*self._socket.getsockname()[:2])
        except BaseException:
            self._socket.close()
            raise

    def accept(self) -> socket.socket:
        """Return the next connection; blocks. After `set_blocking(False)`, raises BlockingIOError if there is none.

        Over TCP it blocks some seconds longer while a peer proves the secret; a stranger is logged and dropped.
        """
        if not self._is_tcp:
            return self._socket.accept()[0]
        while True:
            sock, (host, *_) = self._socket.accept()
            try:
                prove_as_listener(sock, self._secret)
            except (OSError, WrongSecret) as reason:
                sock.close()
                _log.warning("A connection from %s to %s was refused: %s.", host, self.address, reason)
            else:
                return tcp.tuned(sock)

    def set_blocking(self, blocking: bool) -> None:
        """Set whether `accept` blocks."""
        self._socket.setblocking(blocking)

    def set_timeout(self, seconds: float | None) -> None:
        """Set the time after which `accept` raises TimeoutError; None: never."""
        self._socket.settimeout(seconds)

    def fileno(self) -> int:
        """Return the descriptor, for `select`. It is readable when a connection waits for `accept`."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening and remove the path. Idempotent."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            if not self._is_tcp:
                Path(self.address).unlink(missing_ok=True)


def connect(address: str, *, timeout_s: float = 0.0, secret: bytes = b"") -> socket.socket:
    """Connect a blocking socket to `address`, as of `Listener`, retrying for `timeout_s` seconds.

    Raises OSError, and WrongSecret at once.
    """
    if tcp.is_tcp(address):
        sock = tcp.connected(address, timeout_s)
        try:
            prove_as_caller(sock, secret, address)
        except BaseException:
            sock.close()
            raise
        return sock
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
    """Asyncio end of a connection, created by `AsyncChannel.open` and used only from its event loop.

    `on_message` is called for each message, in order, in the event loop iteration that read it. `on_close(error)` is
    called once, last; its error is None if either side closed the channel in order. An exception in `on_message` is a
    bug and closes the channel.
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
        """Connect to the Unix socket at `address`. Raises OSError if no process listens on it."""
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
        """Number of bytes that the peer has not read yet."""
        return self._transport.get_write_buffer_size() if self._transport else 0

    @property
    def is_open(self) -> bool:
        """True until either side closes."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Write the queued frames, then close; `on_close` follows. Idempotent."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport. Called by asyncio."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's class does not derive from it

    def data_received(self, data: bytes) -> None:
        """Pass on the messages that `data` completes. Called by asyncio."""
        try:
            for message in self._reader.feed(data):
                self._on_message(message)
        except Exception as error:  # noqa: BLE001 - reported by on_close; the loop must go on
            self._error = error
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end of the connection. Called by asyncio, once."""
        if self._on_close is not None:
            self._on_close(self._error or exc)
