"""Control pipes between the supervisor and a child: frames of a four-byte little-endian length and msgpack.

Each child has two pipes, so that either side gets an end of file when the other one ends. Invariant: the supervisor
never blocks on a child that does not read. A child may block on its supervisor.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import Any, Generic, TypeVar

import msgspec

from tokenmill.wire.messages import Configure, FromChild, ModelReady, ToChild

MAX_FRAME_BYTES = 1 << 24
"""Limit of a frame; a longer one is a bug."""

_Incoming = TypeVar("_Incoming")
_Outgoing = TypeVar("_Outgoing")


class ParentGoneError(Exception):
    """Raised when the supervisor has died. The child must exit at once."""


class _Pipes(Generic[_Incoming, _Outgoing]):
    """One end of a pair of pipes. Reading never blocks; `send` is thread-safe."""

    def __init__(self, read_fd: int, write_fd: int, decoder: msgspec.msgpack.Decoder[_Incoming]) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self._received = bytearray()
        self._unsent = bytearray()
        self._lock = threading.Lock()
        os.set_blocking(read_fd, False)

    def fileno(self) -> int:
        """Return the descriptor that is readable when `poll` has new messages."""
        return self._read_fd

    def send(self, message: _Outgoing) -> None:
        """Send a frame. If the other end is closed, the frame is dropped; `poll` reports the end."""
        payload = self._encoder.encode(message)
        with self._lock:
            self._unsent += len(payload).to_bytes(4, "little") + payload
            try:
                while self._unsent:
                    del self._unsent[: os.write(self._write_fd, self._unsent)]
            except BlockingIOError:
                return  # the remainder is written with the next frame
            except OSError:  # either end is closed
                self._unsent.clear()

    def _read(self) -> tuple[list[_Incoming], bool]:
        """Return the complete messages, and False if the other end is closed."""
        alive = True
        with contextlib.suppress(BlockingIOError):
            while alive:
                data = os.read(self._read_fd, 65536)
                self._received += data
                alive = bool(data)
        messages = []
        while len(self._received) >= 4:
            length = int.from_bytes(self._received[:4], "little")
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"A control frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed.")
            if len(self._received) < 4 + length:
                break
            messages.append(self._decoder.decode(self._received[4 : 4 + length]))
            del self._received[: 4 + length]
        return messages, alive

    def close(self) -> None:
        """Close both descriptors. Idempotent."""
        for fd in (self._read_fd, self._write_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._read_fd = self._write_fd = -1


class ChildControl(_Pipes[ToChild, FromChild]):
    """Child's end. Construction blocks until `Configure` arrives, which the attribute `configure` then holds."""

    configure: Configure

    def __init__(self, read_fd: int, write_fd: int) -> None:
        super().__init__(read_fd, write_fd, msgspec.msgpack.Decoder(ToChild))
        self._kept: list[ToChild] = []  # read by `wait_model`; the next `poll` returns them
        first = self._wait()
        if not isinstance(first, Configure):
            raise ValueError(f"The first control frame is {type(first).__name__}, not Configure.")
        self.configure = first

    def wait_model(self) -> dict[str, Any]:
        """Block until the model is on disk, and return its `weights.source.ModelSource` as plain data.

        Other messages that arrive are kept for `poll`. Raises ParentGoneError if the supervisor dies.
        """
        others: list[ToChild] = []
        try:
            while not isinstance(message := self._wait(), ModelReady):
                others.append(message)
        finally:
            self._kept[:0] = others
        return message.source

    def poll(self) -> list[ToChild] | None:
        """Return the messages since the last call, without blocking; None if the supervisor has died.

        Call it once before the first wait on `fileno()`, because messages read by `wait_model` do not make the
        descriptor readable.
        """
        messages, alive = self._read()
        if not alive:
            return None
        messages, self._kept = self._kept + messages, []
        return messages

    def _wait(self) -> ToChild:
        while not self._kept:
            select.select([self._read_fd], [], [])
            messages, alive = self._read()
            self._kept += messages
            if not alive:
                raise ParentGoneError
        return self._kept.pop(0)


class ParentControl(_Pipes[FromChild, ToChild]):
    """Supervisor's end. `send` never blocks: bytes that a child does not read are buffered here."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        super().__init__(read_fd, write_fd, msgspec.msgpack.Decoder(FromChild))
        os.set_blocking(write_fd, False)
        self.closed = False

    def poll(self) -> list[FromChild]:
        """Return the messages since the last call, without blocking. Sets `closed` at the end of the stream."""
        if self.closed:
            return []
        messages, alive = self._read()
        self.closed = not alive
        return messages

    def close(self) -> None:
        """Close both pipes. No messages are received afterwards. Idempotent."""
        self.closed = True
        super().close()
