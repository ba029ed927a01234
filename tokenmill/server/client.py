"""EngineClient: an HTTP worker's end of the socket to engine rank 0.

Requests and aborts that are made in one turn of the event loop leave in one frame. Frames that arrive go to their sinks
at once, in the turn that read them: no task is woken per token. When the engine goes away its requests fail and the
client connects again as soon as somebody listens.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Protocol

from tokenmill.errors import GenerationError, NotReady, RequestError
from tokenmill.wire.channel import AsyncChannel
from tokenmill.wire.messages import Abort, EngineInfo, FromEngine, Output, Request, Stats, StepOutputs, ToEngine

_RETRY_S = (0.02, 0.05, 0.1)  # trying costs next to nothing
_SILENCE_S = 60.0  # a heartbeat comes every second; a step that takes longer than this is a hung engine

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Who a request's outputs are for. Called from the event loop; must not block."""

    def push(self, output: Output, now: float) -> bool:
        """Take an output that came at `now` (monotonic seconds). True: the request is over, nothing more may come."""

    def fail(self, error: RequestError) -> None:
        """The request is over without a result."""


class Watcher(Protocol):
    """Who wants to know about the engine itself."""

    def connected(self, info: EngineInfo) -> None:
        """A connection stands; `info` says to what."""

    def stepped(self, stats: Stats, num_outputs: int, handling_s: float) -> None:
        """A frame was handled: its statistics, how many outputs it had, and how long they took."""

    def lost(self) -> None:
        """The connection is gone and all requests with it."""


class EngineClient:
    """Sends requests, hands out what comes back, reconnects. For one event loop; `run` must be running."""

    def __init__(self, address: str, watcher: Watcher) -> None:
        """`address`: path of the Unix socket that rank 0 listens on."""
        self._address = address
        self._watcher = watcher
        self._channel: AsyncChannel[FromEngine] | None = None
        self._closed = asyncio.Event()
        self._sinks: dict[int, Sink] = {}
        self._outbox: list[ToEngine] = []
        self._next_id = secrets.randbits(32) << 31
        self._heard = 0.0
        self.info: EngineInfo | None = None

    @property
    def num_running(self) -> int:
        """Requests that wait for an output."""
        return len(self._sinks)

    @property
    def healthy(self) -> bool:
        """The engine is connected and was heard within the last minute."""
        return self._channel is not None and self.info is not None and time.monotonic() - self._heard < _SILENCE_S

    def new_id(self) -> int:
        """An id that no other worker, past or present, has given to a request."""
        self._next_id += 1
        return self._next_id

    def submit(self, request: Request, sink: Sink) -> None:
        """Send a request; its outputs go to `sink` until the last, an `abort` or a failure. Raises NotReady."""
        if self._channel is None or self.info is None:
            raise NotReady("the engine is starting")
        self._sinks[request.id] = sink
        self._post(request)

    def abort(self, request_id: int) -> None:
        """Forget a request. Its sink hears nothing more. Unknown ids and finished requests are ignored."""
        if self._sinks.pop(request_id, None) is not None:
            self._post(Abort(request_id))

    def abort_all(self, error: RequestError) -> None:
        """Forget every request; their sinks hear `error`."""
        for request_id, sink in list(self._sinks.items()):
            self.abort(request_id)
            sink.fail(error)

    async def run(self) -> None:
        """Connect, and again whenever the connection is lost. Ends only by cancellation."""
        while True:
            await self._connect()
            await self._closed.wait()

    def close(self) -> None:
        """Close the connection; what is running fails."""
        if self._channel is not None:
            self._channel.close()

    async def _connect(self) -> None:
        attempt = 0
        while True:
            try:
                self._closed.clear()
                self._channel = await AsyncChannel.open(self._address, FromEngine, self._receive, self._lost)
                return
            except OSError:
                await asyncio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
                attempt += 1

    def _post(self, message: ToEngine) -> None:
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    def _flush(self) -> None:
        messages, self._outbox = self._outbox, []
        if self._channel is not None and self._channel.is_open:
            self._channel.send(messages)  # if it is not open, `_lost` is about to fail every sink

    def _receive(self, message: FromEngine) -> None:
        now = self._heard = time.monotonic()
        if isinstance(message, StepOutputs):
            sinks = self._sinks
            for output in message.outputs:
                sink = sinks.get(output.request_id)
                if sink is not None:
                    self._push(sink, output, now)
            self._watcher.stepped(message.stats, len(message.outputs), time.monotonic() - now)
        else:
            self.info = message
            self._watcher.connected(message)

    def _push(self, sink: Sink, output: Output, now: float) -> None:
        try:
            if not sink.push(output, now):
                return
            if output.finish_reason:
                del self._sinks[output.request_id]
            else:
                self.abort(output.request_id)
        except Exception as error:  # one request's bug must not end the others
            log.exception("An output could not be handled")
            self.abort(output.request_id)
            sink.fail(GenerationError(f"Server error: {type(error).__name__}"))

    def _lost(self, error: Exception | None) -> None:
        self._channel, self.info = None, None
        if error is not None:
            log.error("The connection to the engine broke: %s", error)
        sinks, self._sinks = self._sinks, {}
        self._watcher.lost()
        for sink in sinks.values():
            sink.fail(GenerationError("Server error: the engine stopped"))
        self._closed.set()
