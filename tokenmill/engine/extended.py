"""Rank 0's own messages to the schedulers: tokens appended without sampling, and early ends."""

from __future__ import annotations

from typing import Protocol

import msgspec

from tokenmill.engine.engine import Link
from tokenmill.wire.messages import Abort, Extend, Output, Stats, ToScheduler


class Extender(Protocol):
    """Interface to a feature of rank 0 that appends tokens to sequences or ends them."""

    due: dict[int, Extend]
    """Message to send before the next step, by request id. The link removes the messages that it sends."""

    @property
    def active(self) -> bool:
        """True if there is a sequence that may be extended."""

    def forget(self, request_id: int) -> None:
        """Drop the state of a request, which has ended. Unknown ids are ignored."""


class Extended:
    """Link around `inner` that adds the messages of `extender` before those of the clients.

    The scheduler ends an extended sequence in the next step. If that end follows a token that has just been sampled,
    `send` adds it to the token's output at once, and later drops the output with the scheduler's own end.
    """

    def __init__(self, inner: Link, extender: Extender) -> None:
        self._inner, self._extender = inner, extender
        self._ended: set[int] = set()  # requests whose end was sent; the scheduler's own output of it is dropped

    def receive(self, block: bool, plan: bytes = b"") -> list[ToScheduler]:
        """See `engine.Link`."""
        messages = list(self._inner.receive(block, plan))
        for message in messages:
            if isinstance(message, Abort):
                self._forget(message.id)
        if due := self._extender.due:
            messages[:0] = due.values()
            due.clear()
        return messages

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`."""
        if self._extender.active or self._ended:
            outputs = [sent for output in outputs if (sent := self._with_end(output))]
        self._inner.send(outputs, stats)

    def _with_end(self, output: Output) -> Output | None:
        """Return the output, with the end of its sequence if that is due next; None if the end was already sent."""
        request_id, due = output.request_id, self._extender.due.get(output.request_id)
        if request_id in self._ended:
            self._forget(request_id)
            return None
        if output.finish_reason:
            self._forget(request_id)
        elif due and due.finish_reason == "stop" and output.token_ids and not due.token_ids:
            self._ended.add(request_id)
            return msgspec.structs.replace(output, finish_reason="stop")
        return output

    def _forget(self, request_id: int) -> None:
        self._ended.discard(request_id)
        self._extender.forget(request_id)
