"""gpt-oss: messages in channels. Analysis is a thought, final and commentary are content, and commentary that is
addressed to functions.name is a call.

Reading an answer is reading its messages here, so one loop emits thoughts, content and calls. Headers of messages are
delimiters; text outside of messages is content.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from tokenmill.errors import ToolError
from tokenmill.text.functions import name_of
from tokenmill.text.lark import Lark, quoted
from tokenmill.text.output import DeltaBuilder
from tokenmill.text.reader import (
    Broken,
    Emit,
    Markers,
    Reading,
    TextCursor,
    before,
    collected,
    spaces,
    surplus,
    take,
    take_end,
    until,
)
from tokenmill.text.tools._calls import random_id
from tokenmill.text.tools._json import EXACT
from tokenmill.text.tools._json_style import emit_call
from tokenmill.text.tools.base import GrammarRequest

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
    """A message's header: its channel, and the function to which it is addressed."""

    channel: str
    function: str
    addressed: bool


def _parsed(text: str, out: DeltaBuilder) -> _Head:
    """Return the header before <|message|>. Raises Broken."""
    found = _HEAD.fullmatch(text)
    if not found:
        raise Broken
    name = found["to2"] or found["to1"] or ""
    function = name.removeprefix("functions.") if name.startswith("functions.") or name in out.schemas else ""
    return _Head(found["channel"] or "final", function, bool(name) and name != "user")


@dataclass(frozen=True)
class Harmony:
    """The format, which has no variants."""

    name: str = "harmony"
    aliases: tuple[str, ...] = ("openai", "gpt-oss", "gptoss", "gpt_oss")
    starts: tuple[str, ...] = ()
    held_starts: tuple[str, ...] = ()
    bare: str = ""
    markers: tuple[str, ...] = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, _CALL, _END, _RETURN)
    trigger: str = ""
    own_loop: bool = True

    def matches(self, template: str, /) -> bool:
        """Return True for templates that write channels."""
        return _CHANNEL in template and _MESSAGE in template

    def new_id(self) -> str:
        """See ToolFormat."""
        return random_id()

    def read(self, r: TextCursor, out: DeltaBuilder) -> Reading[None]:
        """Read a whole answer. Raises nothing."""
        begun = yield from take(r, " to=", "to=")  # the prompt ends inside of the first header
        r.pos -= len(begun)
        while begun or (yield from before(r, _HEADS, out.content)):
            r.settle()
            try:
                yield from _message(r, out)
                r.settle()
            except Broken:
                r.rewind()
                if out.begun:
                    r.pos = len(r.text) if r.ended else r.checked
                    out.cancel(r.text[: r.pos])
                else:
                    head = _HEADS.search(r.text, 0)
                    stop = len(begun) if begun else head.end() if head else 0
                    r.pos = len(r.text) if out.held and r.ended else stop
                    out.content(r.text[: r.pos])
            begun = ""

    def grammar(self, request: GrammarRequest) -> str:
        """See ToolFormat. Thoughts and preambles may come before. A message has one call, and an answer ends with it.
        Only special tokens distinguish headers from messages."""
        lark = Lark(request.special_ids)
        missing = [mark for mark in self.markers if not lark.is_special(mark)]
        if missing and request.extent != "calls":
            raise ToolError(f"Calls cannot be held to a schema: {missing[0]} is no token of this model", "tools")
        channel, message, end = lark.text(_CHANNEL), lark.text(_MESSAGE), lark.text(_END)
        as_json = f'{lark.text(_CONSTRAIN)}? "json" {message}'
        calls = []
        for i, tool in enumerate(request.tools):
            to = f"to=functions.{name_of(tool)}"
            inside = f"{channel} {quoted(f'commentary {to} ')} {as_json}"
            ahead = f'{quoted(f" {to}")} {channel} "commentary " {as_json}'
            calls.append(f"({inside} | {ahead}) {lark.json(f'call_{i}_arguments', request.schema_of(tool))}")
        lark.rule("call", f"({' | '.join(calls)}) {lark.text(_CALL)}")
        final = f'{channel} "final" (" "? {lark.text(_CONSTRAIN)} /[a-z]+/)? {message}'
        text = lark.free("text", (_START, _CHANNEL)).text
        lark.rule("aside", f'{channel} ("analysis" | "commentary") {message} {text}')
        lark.rule("said", f"aside | {final} {text}")
        last = {
            "answer": f" | said ({end} | {lark.text(_RETURN)})?",
            "choice": f" | {final} instead",
        }.get(request.extent, "")
        earlier = "said" if request.extent == "answer" else "aside"
        ahead = "" if missing else f'({earlier} {end} {lark.text(_START)} "assistant")*'
        lark.rule("start", f"{ahead} (call{last})")
        return lark.source() + request.instead


def _message(r: TextCursor, out: DeltaBuilder) -> Reading[None]:
    """Read a header and its message."""
    text, end = yield from collected(lambda emit: _header(r, emit))
    if not end:
        raise Broken
    head = _parsed(text, out)
    if head.function:
        yield from spaces(r)
        marks = EXACT if out.held else _ENDS.texts
        yield from emit_call(r, out, out.check(head.function), marks=marks)
        if marks:
            yield from surplus(r, marks)
        yield from take_end(r, _CALL, _END, _RETURN)
    elif head.addressed:  # to a tool that the request does not have
        raise Broken
    else:
        out.thinking = head.channel == "analysis"
        end = yield from before(r, _ENDS, out.reasoning if out.thinking else out.content)
        r.pos += 0 if end in (_START, _CHANNEL) else len(end)  # the next header ends a message as well
        out.thinking = False


def _header(r: TextCursor, emit: Emit) -> Reading[str]:
    """Read text up to <|message|>."""
    size = 0

    def counted(piece: str) -> None:
        nonlocal size
        size += len(piece)
        if size > _MOST_HEAD:
            raise Broken
        emit(piece)

    return (yield from until(r, _MESSAGES, counted))


FORMAT = Harmony()
matches = FORMAT.matches
