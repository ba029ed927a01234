"""Rank 0's own messages to the schedulers: tokens that come next without being sampled, and early ends."""

from __future__ import annotations

from typing import Protocol

import msgspec

from tokenmill.engine.engine import Link
from tokenmill.wire.messages import Abort, Extend, Output, Stats, ToScheduler


class Extender(Protocol):
    """A feature of rank 0 that extends or ends sequences by itself."""

    found: dict[int, Extend]
    """By request: the message that is due. The link takes it out when it is sent."""

    @property
    def active(self) -> bool:
        """True if there is a sequence that it may extend."""

    def forget(self, request_id: int) -> None:
        """Drop all that is kept of a request, which has ended. Unknown ids are ignored."""


class Extended:
    """The link behind `inner` that puts the messages of `extender` before the clients'.

    A sequence that ends behind a token that has just been sampled is sent with its end at once: the scheduler learns of
    the end with the next step only.
    """

    def __init__(self, inner: Link, extender: Extender) -> None:
        self._inner, self._extender = inner, extender
        self._ended: set[int] = set()  # their end was sent; the scheduler's own output of it is to be dropped

    def receive(self, block: bool, plan: bytes = b"") -> list[ToScheduler]:
        """See `engine.Link`."""
        messages = list(self._inner.receive(block, plan))
        for message in messages:
            if isinstance(message, Abort):
                self._forget(message.id)
        if found := self._extender.found:
            messages[:0] = found.values()
            found.clear()
        return messages

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`."""
        if self._extender.active or self._ended:
            outputs = [sent for output in outputs if (sent := self._with_end(output))]
        self._inner.send(outputs, stats)

    def _with_end(self, output: Output) -> Output | None:
        """The output, with its end if that is the next message of its sequence; None if its end was sent before."""
        request_id, found = output.request_id, self._extender.found.get(output.request_id)
        if request_id in self._ended:
            self._forget(request_id)
            return None
        if output.finish_reason:
            self._forget(request_id)
        elif found and found.finish_reason == "stop" and output.token_ids and not found.token_ids:
            self._ended.add(request_id)
            return msgspec.structs.replace(output, finish_reason="stop")
        return output

    def _forget(self, request_id: int) -> None:
        self._ended.discard(request_id)
        self._extender.forget(request_id)
