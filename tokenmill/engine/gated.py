"""Gate for requests with prerequisites, such as a compiled grammar: they wait here, outside of the scheduler.

A feature provides a `Prerequisite`. Requests wait on rank 0 only: the other ranks receive them when they may run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenmill.errors import RequestError
from tokenmill.wire.messages import Abort, Output, Request, Stats, ToEngine, ToScheduler

_log = logging.getLogger(__name__)


class Pending(Protocol):
    """A result that is being produced. `concurrent.futures.Future` implements it."""

    def done(self) -> bool:
        """Return True if `result` does not block."""

    def result(self) -> object:
        """Return the result. Called once, on the engine's thread.

        Raise any exception if there is no result: it ends only the request that waits.
        """

    def add_done_callback(self, fn: Callable[[Any], object], /) -> None:
        """Call `fn` when done, on any thread; at once if it is done already."""

    def cancel(self) -> object:
        """Cancel the work: the request will not run. May be called after `result`."""


class Prerequisite(Protocol):
    """Interface to something that requests may need before they run. `name`: a noun for messages to users."""

    name: str

    def begin(self, request: Request) -> Pending | None:
        """Begin to produce what the request needs, without blocking. Return None if it may run at once.

        Called once for each request, on the engine's thread. Raise any exception to end only this request.
        """


class Source(Protocol):
    """A link to the clients. `wake` ends its waits."""

    def receive(self, block: bool, plan: bytes = b"") -> Sequence[ToEngine]:
        """See `engine.Link`."""

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`."""

    def wake(self) -> None:
        """End the current or the next wait of `receive`. May be called from any thread, also after the end."""


class Gated:
    """Link around `inner` that holds back requests until their prerequisites are there. Other messages pass.

    A request whose prerequisite fails ends with an error, and never reaches the scheduler.
    """

    def __init__(self, inner: Source, prerequisites: Sequence[Prerequisite]) -> None:
        self._inner, self._prerequisites = inner, prerequisites
        self._held: dict[int, tuple[Request, dict[str, Pending]]] = {}
        self._refused: list[Output] = []

    @property
    def holds(self) -> bool:
        """True if a request is held back."""
        return bool(self._held)

    def receive(self, block: bool, plan: bytes = b"") -> list[ToScheduler]:
        """See `engine.Link`. Requests that were held back come last."""
        passed: list[ToScheduler] = []
        for message in self._inner.receive(block, plan):
            if isinstance(message, Abort):
                if held := self._held.pop(message.id, None):
                    _cancel(held[1])
                passed.append(message)
            elif not self._hold(message):
                passed.append(message)
        if self._held:
            passed += self._ready()
        return passed

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`. Errors of refused requests come first."""
        if self._refused:
            outputs, self._refused = self._refused + outputs, []
        self._inner.send(outputs, stats)

    def close(self) -> None:
        """Cancel all pending prerequisites. Idempotent."""
        for _, pending in self._held.values():
            _cancel(pending)
        self._held.clear()

    def _hold(self, request: Request) -> bool:
        """Begin the prerequisites of a request. Return False if it may run at once."""
        begun: dict[str, Pending] = {}
        for prerequisite in self._prerequisites:
            try:
                pending = prerequisite.begin(request)
            except Exception as error:  # noqa: BLE001  an error ends only this request
                self._refuse(request.id, begun, explain(error, prerequisite.name))
                return True
            if pending is not None:
                begun[prerequisite.name] = pending
        if not begun:
            return False
        self._held[request.id] = request, begun
        for pending in begun.values():
            pending.add_done_callback(lambda _: self._inner.wake())
        return True

    def _ready(self) -> list[Request]:
        """Remove and return the requests whose prerequisites are there. Refuse those whose prerequisites failed."""
        ready = []
        for request_id, (request, begun) in list(self._held.items()):
            if not all(pending.done() for pending in begun.values()):
                continue
            del self._held[request_id]
            if why := _failure(begun):
                self._refuse(request_id, begun, why)
            else:
                ready.append(request)
        return ready

    def _refuse(self, request_id: int, begun: dict[str, Pending], message: str) -> None:
        _cancel(begun)
        self._refused.append(Output(request_id, finish_reason="error", message=message))


def explain(error: Exception, name: str) -> str:
    """Return the message for a request whose prerequisite `name` ("grammar", …) failed. Log errors that are bugs."""
    if isinstance(error, RequestError):
        return str(error)
    _log.error("The %s of a request failed.", name, exc_info=error)
    return f"the {name} that was asked for failed; the server's log says more"


def _failure(begun: dict[str, Pending]) -> str:
    """Get the results of finished prerequisites. Return the message of the first that failed, "" if none did."""
    for name, pending in begun.items():
        try:
            pending.result()
        except Exception as error:  # noqa: BLE001  an error ends only this request
            return explain(error, name)
    return ""


def _cancel(begun: dict[str, Pending]) -> None:
    for pending in begun.values():
        pending.cancel()
