"""Requests that wait for what they need before the scheduler sees them: a grammar that is being compiled, for example.

A feature takes part as a `Prerequisite`. Rank 0 alone waits: the other ranks learn of a request when it may run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenmill.errors import RequestError
from tokenmill.wire.messages import Abort, Output, Request, Stats, ToEngine, ToScheduler

_log = logging.getLogger(__name__)


class Pending(Protocol):
    """Something that will be there later."""

    def done(self) -> bool:
        """True if `result` returns at once."""

    def result(self) -> object:
        """Hand it over. Called once, by the engine's thread. Raises if there is none: that ends the request alone."""

    def add_done_callback(self, fn: Callable[[Any], object], /) -> None:
        """Call `fn` on any thread when done, at once if it is."""

    def cancel(self) -> object:
        """Give up what was begun; its request will not run. Also called after `result`."""


class Prerequisite(Protocol):
    """A kind of thing that requests may need before they run. `name`: the kind, in messages to users."""

    name: str

    def begin(self, request: Request) -> Pending | None:
        """Begin to get what the request needs, without blocking; None if it may run at once.

        Called once for each request, by the engine's thread. Raises if it cannot be had: that ends the request alone.
        """


class Source(Protocol):
    """A link whose messages come from clients, and whose waits can be ended."""

    def receive(self, block: bool, plan: bytes = b"") -> Sequence[ToEngine]:
        """See `engine.Link`."""

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`."""

    def wake(self) -> None:
        """End the current or the next wait of `receive`. May be called from any thread, also after the end."""


class Gated:
    """The link behind `inner` at which requests wait; the others pass. A request for which nothing can be had ends with
    an error, and the scheduler never sees it.
    """

    def __init__(self, inner: Source, prerequisites: Sequence[Prerequisite]) -> None:
        self._inner, self._prerequisites = inner, prerequisites
        self._held: dict[int, tuple[Request, dict[str, Pending]]] = {}
        self._refused: list[Output] = []

    @property
    def holds(self) -> bool:
        """True if a request waits."""
        return bool(self._held)

    def receive(self, block: bool, plan: bytes = b"") -> list[ToScheduler]:
        """See `engine.Link`. Requests that waited come last."""
        passed: list[ToScheduler] = []
        for message in self._inner.receive(block, plan):
            if isinstance(message, Abort):
                if held := self._held.pop(message.id, None):
                    _cancel(held[1])
                passed.append(message)
            elif not self._waits(message):
                passed.append(message)
        if self._held:
            passed += self._ready()
        return passed

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`. Refusals come first."""
        if self._refused:
            outputs, self._refused = self._refused + outputs, []
        self._inner.send(outputs, stats)

    def close(self) -> None:
        """Give up what is waited for. Idempotent."""
        for _, pending in self._held.values():
            _cancel(pending)
        self._held.clear()

    def _waits(self, request: Request) -> bool:
        """Begin to get what a request needs; False if it may run."""
        begun: dict[str, Pending] = {}
        for prerequisite in self._prerequisites:
            try:
                pending = prerequisite.begin(request)
            except Exception as error:  # noqa: BLE001  it ends this request alone
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
        """The requests that need not wait any longer; those whose need cannot be met are refused."""
        ready = []
        for request_id, (request, begun) in list(self._held.items()):
            if not all(pending.done() for pending in begun.values()):
                continue
            del self._held[request_id]
            if why := _finish(begun):
                self._refuse(request_id, begun, why)
            else:
                ready.append(request)
        return ready

    def _refuse(self, request_id: int, begun: dict[str, Pending], message: str) -> None:
        _cancel(begun)
        self._refused.append(Output(request_id, finish_reason="error", message=message))


def explain(error: Exception, name: str) -> str:
    """The message that ends one request whose `name` ("grammar", …) failed. Errors that are bugs go to the log."""
    if isinstance(error, RequestError):
        return str(error)
    _log.error("The %s of a request failed.", name, exc_info=error)
    return f"the {name} that was asked for failed; the server's log says more"


def _finish(begun: dict[str, Pending]) -> str:
    """Take over all that was waited for; why that failed, or ""."""
    for name, pending in begun.items():
        try:
            pending.result()
        except Exception as error:  # noqa: BLE001  it ends this request alone
            return explain(error, name)
    return ""


def _cancel(begun: dict[str, Pending]) -> None:
    for pending in begun.values():
        pending.cancel()
