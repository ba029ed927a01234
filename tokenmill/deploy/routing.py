"""The choice of a replica: `tokenmill.placement` as a request router of Ray Serve.

Serve makes one router for each handle, here one in each ingress, tells it which replicas there are, and waits for its
choice. Serve itself keeps draining and dead replicas away from it.
"""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import Any, NamedTuple

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from tokenmill.deploy.messages import Ask, Progress
from tokenmill.placement.placement import Placement, Ticket
from tokenmill.placement.prompt import prompt_of_text

_CAPACITY = 1 << 17
"""Tokens of a cache whose replica has not reported any."""


class _Placed(NamedTuple):
    """A request that was sent to a replica, until its end."""

    ticket: Ticket[str]
    progress: Progress


class PrefixRouter(RequestRouter):
    """Request router that prefers the replica with the least work before a request's first token.

    See `tokenmill.placement.placement`. Calls without an `Ask` go to any replica.
    """

    def initialize_state(self, seed: int | None = None, at_random: bool = False, **_: Any) -> None:
        """Begin without replicas. Called by Serve with the router's arguments.

        `seed`: of draws; None: another one in each process. `at_random`: ignore prompts and load, to compare with.
        """
        seed = time.time_ns() if seed is None else seed
        self._placement: Placement[str] = Placement(seed=seed)
        self._random = Random(seed)
        self._at_random = at_random
        self._by_name: dict[str, RunningReplica] = {}
        self._placed: dict[tuple[str, str], _Placed] = {}
        self._choices: dict[str, str] = {}  # request -> replica, until it is known that the replica took it

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that run now, and the load that each has reported. Called by Serve."""
        placement = self._placement
        before, self._by_name = self._by_name, {replica.replica_id.unique_id: replica for replica in replicas}
        for gone in before.keys() - self._by_name.keys():
            placement.remove(gone)
        for name, replica in self._by_name.items():
            if name not in placement:
                placement.add(name, int(replica.replica_metadata.get("capacity") or _CAPACITY))
            stats = replica.routing_stats
            if stats:
                placement.report(name, round(stats["running"] + stats["waiting"]))
                placement.drain(name, not stats["up"])
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica that has been found dead. Called by Serve, before its controller knows it."""
        self._by_name.pop(replica_id.unique_id, None)
        self._placement.remove(replica_id.unique_id)
        super().on_replica_actor_died(replica_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the chosen replica alone, as Serve's router expects it. Called by Serve, perhaps again for the same
        request if the replica cannot take it."""
        ask = _ask_of(pending_request)
        if self._at_random:
            replica = self._random.choice(candidate_replicas)
            if ask is not None:
                ask.progress.replica = replica.replica_id.unique_id
            return [[replica]]
        if pending_request is None or ask is None:
            return [list(candidate_replicas)]
        begun, cpu = time.perf_counter(), time.thread_time()
        request_id = pending_request.metadata.internal_request_id
        self._withdraw(request_id)
        chosen = self._place(ask, request_id)
        ask.progress.routing_s = time.perf_counter() - begun, time.thread_time() - cpu
        return [[chosen]] if chosen is not None else [list(candidate_replicas)]

    def _place(self, ask: Ask, request_id: str) -> RunningReplica | None:
        prompt = prompt_of_text(ask.prompt)
        ticket = self._placement.place(prompt, ask.max_new_tokens, ask.exclude)
        ask.progress.replica = ticket.replica if ticket is not None else ""
        if ticket is None:
            return None
        self._choices[request_id] = ticket.replica
        self._placed[ticket.replica, request_id] = _Placed(ticket, ask.progress)
        loop = asyncio.get_running_loop()
        ask.progress.on_start = lambda: _call(loop, self._placement.started, ticket)
        return self._by_name[ticket.replica]

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
