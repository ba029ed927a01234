"""The choice of a replica: `tokenmill.placement` as a request router of Ray Serve.

Serve makes one router for each handle, here one in each ingress, tells it which replicas there are, and waits for its
choice. Serve itself keeps draining and dead replicas away from it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, NamedTuple

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from tokenmill.deploy.messages import Ask, Progress
from tokenmill.placement.placement import Placement, Ticket
from tokenmill.placement.prompt import prompt_of_text

_CAPACITY = 1 << 17
"""Tokens of a cache whose replica has not reported any."""
_SLOW_S = 0.002
"""Time of a choice above which it is logged."""

log = logging.getLogger(__name__)


class _Placed(NamedTuple):
    """A request that was sent to a replica, until its end."""

    ticket: Ticket[str]
    progress: Progress


class PrefixRouter(RequestRouter):
    """Request router that prefers the replica with the least work before a request's first token.

    See `tokenmill.placement.placement`. Calls without an `Ask` go to any replica.
    """

    def initialize_state(self, seed: int | None = None, random: bool = False, **_: Any) -> None:
        """Begin without replicas. Called by Serve with the router's arguments.

        `seed`: of ties and draws; None: another one in each process. `random`: choose at random, to compare with.
        """
        self._placement: Placement[str] = Placement(seed=time.time_ns() if seed is None else seed)
        self._placed: dict[tuple[str, str], _Placed] = {}
        self._choices: dict[str, str] = {}  # request -> replica, until it is known that the replica took it
        self._ignore_prompts = random

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that run now, and the load that each has reported. Called by Serve."""
        names = set()
        for replica in replicas:
            name = replica.replica_id.unique_id
            names.add(name)
            if name not in self._known():
                self._placement.add(name, int(replica.replica_metadata.get("capacity") or _CAPACITY))
                self._names.add(name)
            stats = replica.routing_stats
            if stats:
                self._placement.report(name, round(stats["running"] + stats["waiting"]))
                self._placement.drain(name, not stats["up"])
        for name in self._known() - names:
            self._placement.remove(name)
            self._names.discard(name)
        super().update_replicas(replicas)

    def _known(self) -> set[str]:
        if not hasattr(self, "_names"):
            self._names: set[str] = set()
        return self._names

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the chosen replica alone, as Serve's router expects it. Called by Serve, perhaps again for the same
        request if the replica cannot take it."""
        ask = _ask_of(pending_request)
        if pending_request is None or ask is None or self._ignore_prompts:
            return [list(candidate_replicas)]
        begun = time.perf_counter()
        request_id = pending_request.metadata.internal_request_id
        self._withdraw(request_id)
        replica = self._place(ask, request_id, candidate_replicas)
        if (took_s := time.perf_counter() - begun) > _SLOW_S:
            log.info("The choice of a replica took %.1f ms", 1e3 * took_s)
        return [[replica]] if replica is not None else [list(candidate_replicas)]

    def _place(self, ask: Ask, request_id: str, candidates: list[RunningReplica]) -> RunningReplica | None:
        prompt = prompt_of_text(ask.prompt)
        ticket = self._placement.place(prompt, ask.max_new_tokens, ask.exclude)
        if ticket is None:
            return None
        self._choices[request_id] = ticket.replica
        self._placed[ticket.replica, request_id] = _Placed(ticket, ask.progress)
        loop = asyncio.get_running_loop()
        ask.progress.on_start = lambda: _call(loop, self._placement.started, ticket)
        return next((one for one in candidates if one.replica_id.unique_id == ticket.replica), None)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when a replica has taken a request."""
        self._choices.pop(pending_request.metadata.internal_request_id, None)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request has ended, in whatever way."""
        placed = self._placed.pop((replica_id.unique_id, internal_request_id), None)
        if placed is not None:
            self._placement.ended(placed.ticket, placed.progress.num_new)

    def _withdraw(self, request_id: str) -> None:
        """Forget the earlier choice for a request, which its replica did not take."""
        name = self._choices.pop(request_id, None)
        placed = self._placed.pop((name, request_id), None) if name is not None else None
        if placed is not None:
            self._placement.ended(placed.ticket, 0, complete=False)


def _call(loop: asyncio.AbstractEventLoop, function: Any, *arguments: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)


def _ask_of(pending: PendingRequest | None) -> Ask | None:
    first = pending.args[0] if pending is not None and pending.args else None
    return first if isinstance(first, Ask) else None
