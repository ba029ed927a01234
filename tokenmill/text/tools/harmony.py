"""gpt-oss: messages in channels. Analysis is a thought, final and commentary are content, and commentary that is
addressed to functions.name is a call.

Here reading an answer is reading its messages, so thoughts, content and calls are told from one loop. Headers of
messages are delimiters; whatever is not in a message is content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenmill.text.tools._jsoncalls import random_id, tell_arguments
from tokenmill.text.tools._lark import Choice, Frame, Lark, Tool, grammar, held_schema, name_of
from tokenmill.text.tools._output import Output
from tokenmill.text.tools._reader import Broken, Emit, Markers, Reader, Reading, collected, spaces, take, until

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_CALL, _END, _RETURN = "<|call|>", "<|end|>", "<|return|>"
_HEADS = Markers(_START, _CHANNEL)
_MESSAGES = Markers(_MESSAGE)
_ENDS = Markers(_END, _CALL, _RETURN, _START, _CHANNEL)
_TO = r"(?:\s*to=(?P<to{}>[^\s<]+))?"
_HEAD = re.compile(
    rf"\s*(?:<\|start\|>\s*assistant)?{_TO.format(1)}"
    rf"\s*(?:<\|channel\|>\s*(?P<channel>\w+){_TO.format(2)})?\s*(?:(?:<\|constrain\|>)?\s*\w+)?\s*"
)
_MOST_HEAD = 512


class _Head(NamedTuple):
    """A message's header: its channel, and the function it is addressed to."""

    channel: str
    function: str
    addressed: bool


def _parsed(text: str, out: Output) -> _Head:
    """The header that stands before <|message|>. Raises Broken."""
    found = _HEAD.fullmatch(text)
    if not found:
        raise Broken
    name = found["to2"] or found["to1"] or ""
    function = name.removeprefix("functions.") if name.startswith("functions.") or name in out.schemas else ""
    return _Head(found["channel"] or "final", function, bool(name) and name != "user")


@dataclass(frozen=True)
class Harmony:
    """The format; it has no variants."""

    name: str = "harmony"
    aliases: tuple[str, ...] = ("openai", "gpt-oss", "gptoss", "gpt_oss")
    starts: tuple[str, ...] = ()
    bare: str = ""
    markers: tuple[str, ...] = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, _CALL, _END, _RETURN)
    trigger: str = "to=functions."
    own_loop: bool = True

    def matches(self, template: str, /) -> bool:
        """True for templates that write channels."""
        return _CHANNEL in template and _MESSAGE in template

    def new_id(self) -> str:
        """See ToolFormat."""
        return random_id()

    def read(self, r: Reader, out: Output) -> Reading[None]:
        """A whole answer. Raises nothing."""
        begun = yield from take(r, " to=", "to=")  # the prompt ends inside of the first header
        r.pos -= len(begun)
        while begun or (yield from _until_head(r, out.content)):
            r.settle()
            try:
                yield from _message(r, out)
                r.settle()
            except Broken:
                r.rewind()
                head = _HEADS.search(r.text, 0)
                stop = len(begun) if begun else head.end() if head else 0
                out.content(r.text[:stop])
                r.pos = stop
            begun = ""

    def grammar(
        self, tools: Sequence[Tool], choice: Choice, parallel: bool, special_ids: Mapping[str, int] | None = None
    ) -> tuple[str, str]:
        """See ToolFormat. A message holds one call, and an answer ends with it; it may begin a message of its own,
        as it does behind a thought."""
        frame = Frame(f"{_CHANNEL}commentary {self.trigger}", None, _CALL, self.trigger)
        kind, source = grammar(frame, self._write, tools, choice, parallel, special_ids)
        if choice != "auto":
            begin = Lark(special_ids).text(f"{_START}assistant")
            source = source.replace("\nstart: ", f"\nstart: ({begin})? ")
        return kind, source

    def _write(self, lark: Lark, rule: str, tool: Tool, choice: str) -> str:
        head = lark.text(f"{name_of(tool)} {_CONSTRAIN}json{_MESSAGE}")
        return f"{head} {lark.json(f'{rule}_arguments', held_schema(tool, choice))}"


def _until_head(r: Reader, emit: Emit) -> Reading[bool]:
    """Emits text up to a header, which stays; False at the end."""
    while True:
        found = _HEADS.search(r.text, r.pos)
        stop = found.start() if found else len(r.text) if r.ended else len(r.text) - _HEADS.held(r.text, r.pos)
        if stop > r.pos:
            emit(r.text[r.pos : stop])
            r.pos = stop
        if found or r.ended:
            return bool(found)
        yield


def _message(r: Reader, out: Output) -> Reading[None]:
    """A header and its message."""
    text, end = yield from collected(lambda emit: _header(r, emit))
    if not end:
        raise Broken
    head = _parsed(text, out)
    if head.function:
        yield from spaces(r)
        yield from tell_arguments(r, out, out.check(head.function))
        yield from spaces(r)
        yield from take(r, _CALL, _END, _RETURN)
    elif head.addressed:  # to a tool that nobody here has
        raise Broken
    else:
        out.thinking = head.channel == "analysis"
        yield from _body(r, out.reasoning if out.thinking else out.content)
        out.thinking = False


def _header(r: Reader, emit: Emit) -> Reading[str]:
    """Text up to <|message|>."""
    size = 0

    def counted(piece: str) -> None:
        nonlocal size
        size += len(piece)
        if size > _MOST_HEAD:
            raise Broken
        emit(piece)

    return (yield from until(r, _MESSAGES, counted))


def _body(r: Reader, emit: Emit) -> Reading[None]:
    """A message's text, told as it comes. The header of the next one ends it as well, and stays."""
    while True:
        found = _ENDS.search(r.text, r.pos)
        stop = found.start() if found else len(r.text) if r.ended else len(r.text) - _ENDS.held(r.text, r.pos)
        if stop > r.pos:
            emit(r.text[r.pos : stop])
            r.pos = stop
        r.settle()
        if found:
            r.pos += 0 if found.group() in (_START, _CHANNEL) else len(found.group())
            return
        if r.ended:
            return
        yield


FORMAT = Harmony()
matches = FORMAT.matches
