"""Deltas of an answer: their builder, which formats write to, and their fold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from tokenmill.text.reader import Broken

_MOST_NAME = 256


class CallDelta(msgspec.Struct, frozen=True, gc=False):
    """A part of one call. `id` and `name` come once, with the first delta of an index. `arguments`: a piece of JSON
    text; the joined pieces of a complete call are one JSON object."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class Delta(msgspec.Struct, frozen=True, gc=False):
    """The part of an answer that a piece of text added. In each field the order of the text is kept.

    `broken`: the newest call of the earlier deltas is not one, and this is its text. It is content, before `content`,
    for a client that has not received the call's beginning; a client that has gets none of it again.
    """

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallDelta, ...] = ()
    broken: str = ""

    def __bool__(self) -> bool:
        return bool(self.content or self.calls or self.reasoning)


def fold(deltas: Sequence[Delta]) -> Delta:
    """Return the deltas as one: texts joined, and each call whole. A call that began in them and broke is content."""
    calls: dict[int, CallDelta] = {}
    content: list[str] = []
    broken, num_dropped = "", 0
    for delta in deltas:
        if delta.broken:
            newest = calls.popitem()[1] if calls else None
            if newest is not None and newest.name is not None:
                content.append(delta.broken)
                num_dropped += 1
            else:
                broken = delta.broken
        content.append(delta.content)
        for more in delta.calls:
            index = more.index - num_dropped
            known = calls.get(index, CallDelta(index))
            arguments = known.arguments + more.arguments
            calls[index] = CallDelta(index, arguments, known.id or more.id, known.name or more.name)
    reasoning = "".join(delta.reasoning for delta in deltas)
    return Delta(reasoning, "".join(content), tuple(calls.values()), broken)


class DeltaBuilder:
    """Builder of deltas: collects content, thoughts and calls since the last `take`.

    `schemas`: the parameters' schema of each function by name; without any, every name is a function. `most`: how many
    calls an answer may have. `held`: a grammar constrains the answer, so a call breaks only where the answer is cut
    off, and text in it that looks like another call is not one.
    """

    __slots__ = ("_args", "_broken", "_content", "_deltas", "_id", "_name", "_reasoning", "begun", "complete", "held",
                 "index", "most", "new_id", "schemas", "thinking")  # fmt: skip

    def __init__(
        self, schemas: Mapping[str, Any], new_id: Callable[[], str], most: int | None = None, held: bool = False
    ) -> None:
        self.schemas = schemas
        self.new_id = new_id
        self.most = most
        self.held = held
        self.complete = 0  # calls whose arguments are whole
        self.begun = False  # the newest call has been emitted, and its arguments are not whole
        self.thinking = False  # the newest text is a thought; set by formats that read thoughts
        self.index = -1  # of the newest call
        self._broken = ""
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._deltas: list[CallDelta] = []
        self._args: list[str] = []
        self._id: str | None = None
        self._name: str | None = None

    @property
    def full(self) -> bool:
        """True if the answer may have no further call."""
        return self.most is not None and self.complete >= self.most

    @property
    def over(self) -> bool:
        """True once the answer has all the calls that it may have, so that nothing behind them belongs to it."""
        return self.full and self.complete > 0

    def content(self, text: str) -> None:
        """Add text for the user."""
        if not self.over:
            self._content.append(text)

    def reasoning(self, text: str) -> None:
        """Add text of a thought."""
        if not self.over:
            self._reasoning.append(text)

    def check(self, name: str, known: bool = False) -> str:
        """Return `name`, if it can be a function's; with `known`, if it is one of the given functions'. Raises
        Broken."""
        if not name or len(name) > _MOST_NAME or not name.isprintable() or self.full:
            raise Broken
        if known and self.schemas and name not in self.schemas:
            raise Broken
        return name

    def call(self, name: str, call_id: str | None = None) -> None:
        """Begin a call."""
        self._flush()
        self.index += 1
        self.begun = True
        self._id, self._name = call_id or self.new_id(), name

    def arguments(self, piece: str) -> None:
        """Add to the newest call's arguments, as JSON text."""
        self._args.append(piece)

    def done(self) -> None:
        """Mark the newest call's arguments as whole."""
        self.complete += 1
        self.begun = False

    def cancel(self, text: str) -> None:
        """Take the newest call back: `text` is content. If a part of it has been taken, the next delta is `broken`."""
        taken = self._name is None and not any(delta.index == self.index and delta.name for delta in self._deltas)
        self._deltas = [delta for delta in self._deltas if delta.index != self.index]
        self._args.clear()
        self._id = self._name = None
        self.begun = False
        if taken:
            self._broken = text
        else:
            self.index -= 1
            self.content(text)

    def _flush(self) -> None:
        if self._name is not None or self._args:
            self._deltas.append(CallDelta(self.index, "".join(self._args), self._id, self._name))
            self._args.clear()
            self._id = self._name = None

    def take(self) -> Delta:
        """Return what was added since the last time."""
        self._flush()
        delta = Delta("".join(self._reasoning), "".join(self._content), tuple(self._deltas), self._broken)
        self._broken = ""
        self._reasoning.clear()
        self._content.clear()
        self._deltas.clear()
        return delta
