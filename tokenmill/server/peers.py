"""Datagrams between the HTTP workers of a server: each tells the others which prefixes it has sent to which engine.

So a conversation finds its engine whichever worker gets its next turn. A datagram that is lost, because a worker has
not started or does not read, costs a prefix hit at worst.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from tokenmill.placement.prompt import KEY_BYTES, Prompt

_MAX_BYTES = 1 << 16


class _Placed(msgspec.Struct, frozen=True, array_like=True):
    """A placed prompt. `keys`: of its prefixes, one behind the other."""

    engine: int
    keys: bytes
    num_tokens: int
    num_cached: int


class Peers:
    """The other workers of a server. `placed` is called for each prompt that one of them has placed: with the number
    of the engine, the prompt, and its tokens that were expected to be cached there. For one event loop."""

    def __init__(self, run_dir: str, index: int, num_workers: int, placed: Callable[[int, Prompt, int], None]) -> None:
        """Open the socket of worker `index` in `run_dir`. An older worker's of the same number is replaced."""
        paths = [Path(run_dir) / f"worker-{number}.sock" for number in range(num_workers)]
        self._others = [str(path) for path in paths if path != paths[index]]
        self._placed = placed
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(_Placed).decode
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        paths[index].unlink(missing_ok=True)
        self._socket.bind(str(paths[index]))
        self._loop: asyncio.AbstractEventLoop | None = None

    def listen(self) -> None:
        """Begin to take datagrams in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._receive)

    def tell(self, engine: int, prompt: Prompt, num_cached: int) -> None:
        """Tell the others that a prompt was sent to an engine. Does not block."""
        data = self._encode(_Placed(engine, b"".join(prompt.keys), prompt.num_tokens, num_cached))
        for path in self._others:
            with suppress(OSError):  # it is not there, or its buffer is full
                self._socket.sendto(data, path)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop = None
        self._socket.close()

    def _receive(self) -> None:
        with suppress(BlockingIOError):
            while True:
                told = self._decode(self._socket.recv(_MAX_BYTES))
                keys = [told.keys[at : at + KEY_BYTES] for at in range(0, len(told.keys), KEY_BYTES)]
                self._placed(told.engine, Prompt(keys, told.num_tokens), told.num_cached)
