"""The control pipes between the supervisor and a child: frames of a 4-byte little-endian length and msgpack.

Two pipes a child, so that each side sees at once, as end of file, that the other is gone. The supervisor never blocks
on a child that does not read; a child may block on its supervisor.
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
"""A longer frame is an error of ours, not a message."""

_Incoming = TypeVar("_Incoming")
_Outgoing = TypeVar("_Outgoing")


class ParentGoneError(Exception):
    """The supervisor has died: the child has nobody to work for and must exit at once."""


class _Pipes(Generic[_Incoming, _Outgoing]):
    """One end of a pair of pipes. Reading never blocks; `send` is safe from several threads."""

    def __init__(self, read_fd: int, write_fd: int, decoder: msgspec.msgpack.Decoder[_Incoming]) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self._received = bytearray()
        self._unsent = bytearray()
        self._lock = threading.Lock()
        os.set_blocking(read_fd, False)

    def fileno(self) -> int:
        """The descriptor that is readable when `poll` has something new to say."""
        return self._read_fd

    def send(self, message: _Outgoing) -> None:
        """Send a frame. If the other end is gone nothing happens: `poll` tells."""
        payload = self._encoder.encode(message)
        with self._lock:
            self._unsent += len(payload).to_bytes(4, "little") + payload
            try:
                while self._unsent:
                    del self._unsent[: os.write(self._write_fd, self._unsent)]
            except BlockingIOError:
                return  # the rest goes with the next frame
            except OSError:  # the other end is gone, or this one was closed
                self._unsent.clear()

    def _read(self) -> tuple[list[_Incoming], bool]:
        """Messages that are complete, and whether the other end is still there."""
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
    """The child's end. Blocks until the supervisor's `Configure` is there, which `configure` then holds."""

    configure: Configure

    def __init__(self, read_fd: int, write_fd: int) -> None:
        super().__init__(read_fd, write_fd, msgspec.msgpack.Decoder(ToChild))
        self._kept: list[ToChild] = []  # read while waiting for something else; the next `poll` returns them
        first = self._wait()
        if not isinstance(first, Configure):
            raise ValueError(f"The first control frame is {type(first).__name__}, not Configure.")
        self.configure = first

    def wait_model(self) -> dict[str, Any]:
        """Block until the model is on disk; its `weights.source.ModelSource` as plain data.

        What else arrives meanwhile is kept for `poll`. Raises ParentGoneError if the supervisor dies.
        """
        others: list[ToChild] = []
        try:
            while not isinstance(message := self._wait(), ModelReady):
                others.append(message)
        finally:
            self._kept[:0] = others
        return message.source

    def poll(self) -> list[ToChild] | None:
        """Messages since the last call, without blocking; None if the supervisor has died.

        Call it once before the first wait on `fileno()`: messages read by `wait_model` do not make that readable.
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
    """The supervisor's end. `send` never blocks: what a child does not read waits here."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        super().__init__(read_fd, write_fd, msgspec.msgpack.Decoder(FromChild))
        os.set_blocking(write_fd, False)
        self.closed = False

    def poll(self) -> list[FromChild]:
        """Messages since the last call, without blocking. At the end of the stream sets `closed`."""
        if self.closed:
            return []
        messages, alive = self._read()
        self.closed = not alive
        return messages

    def close(self) -> None:
        """Close both pipes; nothing is heard any more. Idempotent."""
        self.closed = True
        super().close()
