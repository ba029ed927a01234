"""Server-sent events without a task switch per event.

A callback of the engine's reader writes text into a stream. `send` of an ASGI server is a coroutine, but it waits only
when the client reads too slowly, so it is driven by hand and finishes at once. If it does wait, its rest becomes a task
and further events are buffered, up to `MAX_BUFFERED_BYTES`. A client that exceeds this, or that reads nothing for
`STALL_S`, is cut off, because it would hold memory and permits of the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any

from starlette.types import Send

Headers = list[tuple[bytes, bytes]]

KEEP_ALIVE_S = 15.0
STALL_S = 30.0
MAX_BUFFERED_BYTES = 256 * 1024

DONE = b"data: [DONE]\n\n"
_COMMENT = b":\n\n"
_HEADERS: Headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]


def event(payload: bytes) -> bytes:
    """Return one event with this JSON text as its data."""
    return b"data: " + payload + b"\n\n"


class _Rest:
    """Awaitable rest of a coroutine that was started by hand and waits for `waited_for`."""

    __slots__ = ("_coroutine", "_waited_for")

    def __init__(self, coroutine: Coroutine[Any, Any, None], waited_for: Any) -> None:
        self._coroutine, self._waited_for = coroutine, waited_for

    def __await__(self) -> Generator[Any, Any, None]:
        waited_for = self._waited_for
        while True:
            try:
                try:
                    value = yield waited_for
                except asyncio.CancelledError as error:  # raise it where the coroutine waits
                    waited_for = self._coroutine.throw(error)
                else:
                    waited_for = self._coroutine.send(value)
            except StopIteration:
                return


class EventStream:
    """One open event stream over an ASGI `send`.

    `write` and `end` never wait. The response starts with the first of them, or with the first keep-alive comment, so
    an error before that can still be an ordinary answer (`started`). `done` is set when everything has been handed
    over, or the client was cut off because it read too slowly (`overflowed`).
    """

    def __init__(
        self, send: Send, headers: Headers, keep_alive_s: float = KEEP_ALIVE_S, stall_s: float = STALL_S
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._send = send
        self._headers = headers
        self._keep_alive_s, self._stall_s = keep_alive_s, stall_s
        self._stall: asyncio.TimerHandle | None = None  # runs while the client reads nothing
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._flusher: asyncio.Task[None] | None = None
        self._ended = False  # nothing more is accepted
        self._completed = False  # the end of the response was handed over
        self._last_write = self._loop.time()
        self._timer = self._loop.call_later(keep_alive_s, self._keep_alive)
        self.started = False
        self.overflowed = False
        self.done: asyncio.Future[None] = self._loop.create_future()

    def write(self, data: bytes) -> None:
        """Send whole events, or buffer them while the client does not read. Dropped after `end` or an overflow."""
        if self._ended:
            return
        self._last_write = self._loop.time()
        if self._flusher is None:
            self._drive(self._deliver(data, True))
            return
        self._pending.append(data)
        self._pending_bytes += len(data)
        if self._pending_bytes > MAX_BUFFERED_BYTES:
            self._cut_off()

    def end(self, data: bytes = b"") -> None:
        """Send the last events and finish the response."""
        if self._ended:
            return
        self._ended = True
        self._timer.cancel()
        if self._flusher is not None:
            self._pending.append(data)
            return
        self._completed = True
        self._drive(self._deliver(data, False))
        if self._flusher is None:
            self._finish()

    def close(self) -> None:
        """Stop sending, because the client is gone or cut off. Idempotent."""
        self._ended = True
        self._timer.cancel()
        self._watch(False)
        self._pending.clear()
        if self._flusher is not None:
            self._flusher.cancel()
        self._finish()

    async def _deliver(self, data: bytes, more: bool) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS + self._headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def _drive(self, coroutine: Coroutine[Any, Any, None]) -> None:
        try:
            waited_for = coroutine.send(None)
        except StopIteration:
            return
        except OSError:
            self.close()
            return
        self._watch(True)
        self._flusher = self._loop.create_task(self._flush(_Rest(coroutine, waited_for)))

    async def _flush(self, rest: _Rest) -> None:
        """Finish an interrupted send, then the events that were buffered meanwhile, then return to writing directly."""
        try:
            await rest
            while self._pending:
                data = b"".join(self._pending)
                self._pending.clear()
                self._pending_bytes = 0
                self._watch(True)
                await self._deliver(data, True)
            if self._ended and not self._completed:
                self._watch(True)
                await self._deliver(b"", False)
        except OSError:
            self.close()
            return
        self._watch(False)
        self._flusher = None
        if self._ended:
            self._finish()

    def _watch(self, waits: bool) -> None:
        """Restart the timer of a client that reads nothing, or stop it."""
        if self._stall is not None:
            self._stall.cancel()
        self._stall = self._loop.call_later(self._stall_s, self._cut_off) if waits else None

    def _cut_off(self) -> None:
        self.overflowed = True
        self.close()

    def _keep_alive(self) -> None:
        silent = self._loop.time() - self._last_write
        if silent >= self._keep_alive_s * 0.999 and self._flusher is None:
            self.write(_COMMENT)
            silent = 0.0
        self._timer = self._loop.call_later(max(self._keep_alive_s - silent, 0.01), self._keep_alive)

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
