"""Continuation of a stream whose replica was lost: another replica gets the tokens so far, and its events follow on.

A server marks the events of a stream with the ids of their tokens, as SSE's `id`, if it is asked to (see
`server/resume.py`). They are kept and removed here. The next replica's events repeat the tokens that it was given;
those are dropped, so the client gets each event once.
"""

from __future__ import annotations

import re

from tokenmill.server.resume import MAX_RESUMED, encode_ids

_END = b"\n\n"
_ID = b"id: "
_DONE = b"data: [DONE]"
_IDENTITIES = (re.compile(rb'"id":"[^"]*"'), re.compile(rb'"created":\d+'))
_CHOICES = b'"choices"'


class ContinuedStream:
    """The events of one streamed answer, from all replicas that take part in it.

    `ids`: tokens of the events that were passed on. `over`: the stream's last event has been passed on.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.over = False
        self._unmarked = False  # an event without tokens was passed on: it cannot be told where to go on
        self._buffer = b""
        self._repeated = 0  # tokens that the current replica still repeats
        self._identity: list[bytes] | None = None  # fields that are the same in all events of an answer

    @property
    def resumable(self) -> bool:
        """True if another replica can go on."""
        return not self._unmarked and len(self.ids) <= MAX_RESUMED

    def resume_header(self) -> bytes:
        """Return the value of the header that gives the tokens so far to the next replica."""
        return encode_ids(self.ids)

    def restart(self) -> None:
        """Begin with the events of another replica, which was given the tokens so far."""
        self._buffer, self._repeated = b"", len(self.ids)

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the current replica and return the complete events to pass on."""
        *events, self._buffer = (self._buffer + data).split(_END)
        return b"".join(part + _END for event in events if (part := self._passed(event)))

    def _passed(self, event: bytes) -> bytes:
        """Return an event without its mark, b"" if the client has it already."""
        ids: list[int] = []
        if event.startswith(_ID):
            mark, _, event = event.partition(b"\n")
            ids = [int(word) for word in mark[len(_ID) :].split(b",")]
        if self._repeated > 0:
            self._repeated -= len(ids)
            return b""
        self.ids += ids
        if event.startswith(_DONE):
            self.over = True
        elif event.startswith(b"data:"):
            self._unmarked |= not ids
            event = self._renamed(event)
        return event

    def _renamed(self, event: bytes) -> bytes:
        """Return an event with the id and time of the first replica's events."""
        head, choices, rest = event.partition(_CHOICES)
        if not choices:
            return event
        found = [match.group() if (match := field.search(head)) else b"" for field in _IDENTITIES]
        if self._identity is None:
            self._identity = found
        for own, first in zip(found, self._identity, strict=True):
            if own and own != first:
                head = head.replace(own, first, 1)
        return head + choices + rest
