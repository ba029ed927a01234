"""Messages between an ingress and its replicas, and the interface that the ingress sees replicas by."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import msgspec

from tokenmill.errors import TokenmillError

Headers = list[tuple[bytes, bytes]]


class Progress:
    """State of one answer, shared by the ingress and its router; a copy in another process is empty.

    `replica`: the chosen one. `num_new`: tokens of the answer so far. `on_start`: called once, when the first of them
    has come. `routing_s`: what the choice of the replica took, in seconds of wall time and of CPU time.
    """

    def __init__(self) -> None:
        self.replica = ""
        self.num_new = 0
        self.routing_s = (0.0, 0.0)
        self.on_start: Callable[[], None] | None = None

    def advance(self, num_new: int) -> None:
        """Record that the answer has `num_new` tokens."""
        self.num_new = num_new
        if self.on_start is not None:
            self.on_start()
            self.on_start = None

    def __reduce__(self) -> tuple[type[Progress], tuple[()]]:
        return Progress, ()


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP request for any replica of a model, and what its routing needs.

    `target`: path and query. `prompt`: text of the prompt, as far as its prefix is concerned. `max_new_tokens`: of the
    answer. `exclude`: replicas that have refused this request.
    """

    method: str
    target: str
    headers: Headers = []
    body: bytes = b""
    prompt: str = ""
    max_new_tokens: int = 0
    exclude: tuple[str, ...] = ()
    progress: Progress = msgspec.field(default_factory=Progress)


class Head(msgspec.Struct, frozen=True):
    """The first part of a replica's answer. `replica`: its name."""

    replica: str
    status: int
    headers: Headers


class ReplicaInfo(msgspec.Struct, frozen=True):
    """A running replica. `address`: `http://host:port` of its server, for clients beside the proxy; "" for none."""

    replica: str
    address: str


class ReplicaLost(TokenmillError):
    """A replica has ended, or its server has, before the end of an answer."""


class Replicas(Protocol):
    """All replicas of one model."""

    def send(self, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
        """Send a request to one replica and yield its answer: a `Head`, then the parts of the body as they come.

        Waits while there is no replica. Raises ReplicaLost. Closing the generator aborts the request.
        """

    async def info(self, ask: Ask) -> ReplicaInfo:
        """Return the replica that `ask` would be sent to. Raises ReplicaLost."""

    async def infos(self) -> list[ReplicaInfo]:
        """Return all running replicas."""

    async def broadcast(self, ask: Ask) -> list[tuple[Head, bytes]]:
        """Send a request to every running replica and return the answers."""
