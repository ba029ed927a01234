"""EngineClient: an HTTP worker's end of the socket to engine rank 0.

Requests and aborts of one iteration of the event loop are sent in one frame. Outputs are passed to their generations in
the callback that read the frame, so no task is woken for a token. When the connection is lost, running requests fail
and the client connects again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

from tokenmill.errors import GenerationError, NotReady, RequestError
from tokenmill.server.engine_status import EngineStatus
from tokenmill.server.generation import Generation
from tokenmill.wire.channel import AsyncChannel
from tokenmill.wire.messages import Abort, EngineInfo, FromEngine, Output, Request, StepOutputs, ToEngine

_RETRY_S = (0.02, 0.05, 0.1)  # an attempt costs next to nothing
_SILENCE_S = 60.0  # a heartbeat comes every second; a step that takes longer than this is a hung engine

log = logging.getLogger(__name__)


class EngineClient:
    """Sends requests, passes outputs to their generations, reconnects. For one event loop; `run` must be running."""

    def __init__(self, address: str, status: EngineStatus) -> None:
        """Make a client that is not connected. `address`: path of the Unix socket on which rank 0 listens."""
        self._address = address
        self._status = status
        self._channel: AsyncChannel[FromEngine] | None = None
        self._closed = asyncio.Event()
        self._generations: dict[int, Generation] = {}
        self._outbox: list[ToEngine] = []
        self._next_id = secrets.randbits(32) << 31
        self._heard = 0.0
        self.info: EngineInfo | None = None

    @property
    def healthy(self) -> bool:
        """True while the engine is connected and was heard within the last minute."""
        return self._channel is not None and self.info is not None and time.monotonic() - self._heard < _SILENCE_S

    def new_id(self) -> int:
        """Return an id that no other worker, past or present, has given to a request."""
        self._next_id += 1
        return self._next_id

    def submit(self, request: Request, generation: Generation) -> None:
        """Send a request. Its outputs go to `generation` until the last one, an `abort` or a failure. Raises
        NotReady."""
        if self._channel is None or self.info is None:
            raise NotReady("the engine is starting")
        self._generations[request.id] = generation
        self._post(request)

    def abort(self, request_id: int) -> None:
        """Stop a request. Its generation gets nothing more. Unknown ids and finished requests are ignored."""
        if self._generations.pop(request_id, None) is not None:
            self._post(Abort(request_id))

    def abort_all(self, error: RequestError) -> None:
        """Stop every request, and fail their generations with `error`."""
        for request_id, generation in list(self._generations.items()):
            self.abort(request_id)
            generation.fail(error)

    async def run(self) -> None:
        """Connect, and reconnect whenever the connection is lost. Ends only by cancellation."""
        while True:
            await self._connect()
            await self._closed.wait()

    def close(self) -> None:
        """Close the connection. Running requests fail."""
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
            self._channel.send(messages)  # if it is not open, `_lost` is about to fail every generation

    def _receive(self, message: FromEngine) -> None:
        now = self._heard = time.monotonic()
        if isinstance(message, StepOutputs):
            generations = self._generations
            for output in message.outputs:
                generation = generations.get(output.request_id)
                if generation is not None:
                    self._push(generation, output, now)
            self._status.stepped(message.stats, len(message.outputs), time.monotonic() - now)
        else:
            self.info = message
            self._status.connected(message)

    def _push(self, generation: Generation, output: Output, now: float) -> None:
        try:
            if not generation.push(output, now):
                return
            if output.finish_reason:
                del self._generations[output.request_id]
            else:
                self.abort(output.request_id)
        except Exception as error:  # one request's bug must not end the others
            log.exception("An output could not be handled")
            self.abort(output.request_id)
            generation.fail(GenerationError(f"Server error: {type(error).__name__}"))

    def _lost(self, error: Exception | None) -> None:
        self._channel, self.info = None, None
        if error is not None:
            log.error("The connection to the engine broke: %s", error)
        generations, self._generations = self._generations, {}
        self._status.lost(len(generations))
        for generation in generations.values():
            generation.fail(GenerationError("Server error: the engine stopped"))
        self._closed.set()
