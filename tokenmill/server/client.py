"""EngineClient: an HTTP worker's requests on the engines of this server.

Each request is placed on one engine by `tokenmill.placement`: its token ids are at hand here, and each worker places
its own requests. Outputs are passed to their generations in the callback that read the frame, so no task is woken for a
token. When an engine is lost, its requests go on at once on the others, behind the tokens that they have; without
another engine they fail.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from tokenmill.errors import GenerationError, NotReady, RequestError
from tokenmill.placement.placement import Placement, Ticket
from tokenmill.placement.prompt import Prompt, prompt_of_tokens
from tokenmill.server.connection import EngineConnection
from tokenmill.server.engine_status import EngineStatus
from tokenmill.server.generation import Generation
from tokenmill.server.peers import Peers
from tokenmill.wire.messages import Abort, EngineInfo, Output, Request, StepOutputs

Recorder = Callable[[int, Prompt, int], None]

_SILENCE_S = 60.0  # a heartbeat comes every second; a step that takes longer than this is a hung engine
_QUIET_S = 5.0  # an engine that is silent so long gets no new requests if there is another

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    """A request on an engine. `num_before`: tokens that it had when it was moved there; -1: it was never moved."""

    request: Request
    generation: Generation
    connection: EngineConnection
    ticket: Ticket[int]
    num_before: int = -1
    started: bool = False  # the engine has sent a token


class EngineClient:
    """Sends requests, passes outputs to their generations. For one event loop; `run` must be running."""

    def __init__(
        self,
        addresses: Sequence[str],
        status: EngineStatus,
        *,
        peers: Callable[[Recorder], Peers] | None = None,
        seed: int | None = None,
    ) -> None:
        """Make a client that is not connected.

        `addresses`: paths of the Unix sockets on which the engines' ranks 0 listen. `peers`: makes the connection to
        other workers that place on them; None: there are none. `seed`: of placement; None: drawn.
        """
        self._status = status
        self._connections = [EngineConnection(index, address, self) for index, address in enumerate(addresses)]
        self._placement: Placement[int] = Placement(seed=secrets.randbits(32) if seed is None else seed)
        self._running: dict[int, _Running] = {}
        self._next_id = secrets.randbits(32) << 31
        self._closing = False
        self._peers = None if peers is None else peers(self._placement.record)

    @property
    def info(self) -> EngineInfo | None:
        """The first connected engine's; None while none is connected."""
        return next((one.info for one in self._connections if one.info is not None), None)

    @property
    def num_engines(self) -> int:
        """Number of engines, connected or not."""
        return len(self._connections)

    @property
    def healthy(self) -> bool:
        """True while an engine is connected and was heard within the last minute."""
        now = time.monotonic()
        return any(one.info is not None and now - one.heard < _SILENCE_S for one in self._connections)

    def new_id(self) -> int:
        """Return an id that no other worker, past or present, has given to a request."""
        self._next_id += 1
        return self._next_id

    def submit(self, request: Request, generation: Generation) -> None:
        """Send a request. Its outputs go to `generation` until the last one, an `abort` or a failure. Raises
        NotReady."""
        if not self._send(request, generation):
            raise NotReady("the engine is starting")

    def abort(self, request_id: int) -> None:
        """Stop a request. Its generation gets nothing more. Unknown ids and finished requests are ignored."""
        running = self._running.get(request_id)
        if running is not None:
            self._end(running, complete=False)
            running.connection.post(Abort(request_id))

    def abort_all(self, error: RequestError) -> None:
        """Stop every request, and fail their generations with `error`."""
        for request_id, running in list(self._running.items()):
            self.abort(request_id)
            running.generation.fail(error)

    async def run(self) -> None:
        """Connect to all engines, and reconnect whenever a connection is lost. Ends only by cancellation."""
        if self._peers is not None:
            self._peers.listen()
        async with asyncio.TaskGroup() as group:
            for connection in self._connections:
                group.create_task(connection.run())

    def close(self) -> None:
        """Close the connections. Running requests fail."""
        self._closing = True
        for connection in self._connections:
            connection.close()
        if self._peers is not None:
            self._peers.close()

    # Events of connections

    def connected(self, connection: EngineConnection, info: EngineInfo) -> None:
        """See `connection.Events`."""
        self._placement.add(connection.index, info.capacity)
        self._status.connected(connection.index, info)

    def received(self, connection: EngineConnection, message: StepOutputs) -> None:
        """See `connection.Events`."""
        requests = self._running
        for output in message.outputs:
            running = requests.get(output.request_id)
            if running is not None:
                self._push(running, output, connection.heard)
        stats = message.stats
        self._placement.report(connection.index, stats.running + stats.waiting)
        handling_s = time.monotonic() - connection.heard
        self._status.stepped(connection.index, stats, len(message.outputs), handling_s)

    def lost(self, connection: EngineConnection, error: Exception | None) -> None:
        """See `connection.Events`."""
        if error is not None:
            log.error("The connection to the engine broke: %s", error)
        self._placement.remove(connection.index)
        own = [running for running in self._running.values() if running.connection is connection]
        self._status.lost(connection.index, len(own))
        num_moved = 0
        for running in own:
            self._end(running, complete=False)
            if self._go_on(running):
                num_moved += 1
            else:
                running.generation.fail(GenerationError("Server error: the engine stopped"))
        if own:
            log.warning("Engine %d stopped; of its %d requests, %d go on elsewhere", connection.index, len(own),
                        num_moved)  # fmt: skip

    def _send(self, request: Request, generation: Generation, num_before: int = -1) -> bool:
        """Place a request and send it. False: no engine is connected."""
        ticket = self._place(request)
        if ticket is None:
            return False
        connection = self._connections[ticket.replica]
        generation.engine = connection.index
        self._running[request.id] = _Running(request, generation, connection, ticket, num_before)
        connection.post(request)
        return True

    def _place(self, request: Request) -> Ticket[int] | None:
        now = time.monotonic()
        quiet = {one.index for one in self._connections if now - one.heard > _QUIET_S}
        num_tokens, left = len(request.prompt_ids), request.stopping.max_new_tokens - len(request.output_ids)
        info = self.info
        if len(self._connections) == 1 or info is None or not info.shares_prefixes:
            prompt = Prompt([], num_tokens + len(request.output_ids))
        else:
            prompt = prompt_of_tokens((*request.prompt_ids, *request.output_ids), request.salt)
        ticket = self._placement.place(prompt, left, quiet) or (self._placement.place(prompt, left) if quiet else None)
        if ticket is not None and self._peers is not None and prompt.keys:
            self._peers.tell(ticket.replica, prompt, ticket.num_cached)
        return ticket

    def _go_on(self, running: _Running) -> bool:
        """Continue the request of a lost engine on another one. False: it cannot be, or it must not be.

        A request that two engines have died under without a token between is not given to a third one: it may be what
        they died of.
        """
        generation = running.generation
        output_ids = tuple(generation.token_ids)
        if self._closing or len(output_ids) == running.num_before:
            return False
        request = msgspec.structs.replace(running.request, output_ids=output_ids, sent_at=time.monotonic())
        if not self._send(request, generation, len(output_ids)):
            return False
        generation.resume()
        self._status.resumed()
        return True

    def _end(self, running: _Running, *, complete: bool) -> None:
        del self._running[running.request.id]
        num_new = len(running.generation.token_ids) - len(running.request.output_ids)
        self._placement.ended(running.ticket, num_new, complete=complete)

    def _push(self, running: _Running, output: Output, now: float) -> None:
        generation = running.generation
        if not running.started and output.token_ids:
            running.started = True
            self._placement.started(running.ticket)
        try:
            if not generation.push(output, now):
                return
            if output.finish_reason:
                self._end(running, complete=output.finish_reason != "error")
            else:
                self.abort(output.request_id)
        except Exception as error:  # one request's bug must not end the others
            log.exception("An output could not be handled")
            self.abort(output.request_id)
            generation.fail(GenerationError(f"Server error: {type(error).__name__}"))
