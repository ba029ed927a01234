"""FunctionGemma: <start_function_call>call:name{key:value}<end_function_call>, strings between <escape> tags."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenmill.text.tools._jsoncalls import random_id
from tokenmill.text.tools._lark import Choice, Frame, Lark, Tool, grammar, held_schema, name_of
from tokenmill.text.tools._output import Output
from tokenmill.text.tools._reader import (
    Broken,
    Emit,
    Markers,
    Reader,
    Reading,
    collected,
    expect,
    peek,
    spaces,
    take,
    until,
    word,
)
from tokenmill.text.tools._values import ALL, dumps, inside, number, types_of

_START, _END, _QUOTE = "<start_function_call>", "<end_function_call>", "<escape>"
_NAME = re.compile(r"[^{}<>\s]+")
_KEY = re.compile(r"[^{}\[\],:<>]+")
_NUMBER = re.compile(r"[-+.\w]+")
_QUOTES = Markers(_QUOTE)
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_MOST_DEPTH = 40


def _value(r: Reader, emit: Emit, depth: int = 0) -> Reading[None]:
    """A value, emitted as JSON."""
    if depth > _MOST_DEPTH:
        raise Broken
    char = yield from peek(r)
    if char == "<":
        yield from expect(r, _QUOTE)
        emit('"')
        if not (yield from until(r, _QUOTES, lambda text: emit(inside(text)))):
            raise Broken
        emit('"')
    elif char == "{":
        r.pos += 1
        emit("{")
        yield from _entries(r, emit, depth)
        emit("}")
    elif char == "[":
        r.pos += 1
        emit("[")
        yield from _items(r, emit, depth)
        emit("]")
    else:
        text = yield from word(r, _NUMBER)
        emit(_WORDS[text] if text in _WORDS else number(text))


def _items(r: Reader, emit: Emit, depth: int) -> Reading[None]:
    """What follows an opening square bracket, the closing one included."""
    yield from spaces(r)
    first = True
    while not (yield from take(r, "]")):
        if not first:
            yield from expect(r, ",")
            yield from spaces(r)
            emit(", ")
        first = False
        yield from _value(r, emit, depth + 1)
        yield from spaces(r)


def _entries(r: Reader, emit: Emit, depth: int) -> Reading[None]:
    """What follows an opening brace, the closing one included."""
    yield from spaces(r)
    first = True
    while not (yield from take(r, "}")):
        if not first:
            yield from expect(r, ",")
            yield from spaces(r)
        if (yield from take(r, _QUOTE)):
            key, end = yield from collected(lambda parts: until(r, _QUOTES, parts))
            if not end:
                raise Broken
        else:
            key = (yield from word(r, _KEY)).strip()
        yield from spaces(r)
        yield from expect(r, ":")
        emit(f"{'' if first else ', '}{dumps(key)}: ")
        first = False
        yield from spaces(r)
        yield from _value(r, emit, depth + 1)
        yield from spaces(r)


@dataclass(frozen=True)
class FunctionGemma:
    """The format; it has no variants."""

    name: str = "functiongemma"
    aliases: tuple[str, ...] = ("function_gemma",)
    starts: tuple[str, ...] = (_START,)
    bare: str = ""
    markers: tuple[str, ...] = (_START, _END, _QUOTE)
    trigger: str = _START
    own_loop: bool = False

    def matches(self, template: str, /) -> bool:
        """True for templates with its tags."""
        return _START in template

    def new_id(self) -> str:
        """See ToolFormat."""
        return random_id()

    def read(self, r: Reader, out: Output) -> Reading[None]:
        """One call."""
        yield from spaces(r)
        yield from expect(r, _START)
        yield from spaces(r)
        yield from expect(r, "call:")
        name = out.check((yield from word(r, _NAME)))
        yield from expect(r, "{")
        out.call(name)
        out.arguments("{")
        yield from _entries(r, out.arguments, 0)
        out.arguments("}")
        out.done()
        r.settle()
        yield from spaces(r)
        yield from take(r, _END)

    def grammar(
        self, tools: Sequence[Tool], choice: Choice, parallel: bool, special_ids: Mapping[str, int] | None = None
    ) -> tuple[str, str]:
        """See ToolFormat. Objects and lists are held to their form and not to their schema, which the format's own
        quotes keep JSON's grammars from."""
        frame = Frame(_START, _END + _START, _END, _START)
        return grammar(frame, self._write, tools, choice, parallel, special_ids)

    def _write(self, lark: Lark, rule: str, tool: Tool, choice: str) -> str:
        schema = held_schema(tool, choice)
        properties = schema.get("properties")
        given: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        required = schema.get("required")
        wanted = [key for key in given if isinstance(required, list) and key in required]
        optional = [key for key in given if key not in wanted]
        parts = [self._entry(lark, key, schema) for key in wanted + optional]
        firm, loose = parts[: len(wanted)], parts[len(wanted) :]
        body = lark.text(f"call:{name_of(tool)}{{")
        if firm:
            body += " " + ' "," '.join(firm) + "".join(f' ("," {part})?' for part in loose)
        elif loose:
            tails = [part + "".join(f' ("," {later})?' for later in loose[i + 1 :]) for i, part in enumerate(loose)]
            body += f" ({' | '.join(tails)})?"
        return f'{body} "}}"'

    def _entry(self, lark: Lark, key: str, schema: Mapping[str, Any]) -> str:
        _write_values(lark)
        types = types_of(schema["properties"][key], schema)
        kinds = [f"fg_{kind}" for kind in sorted(types)] if types != ALL else ["fg_value"]
        return f"{lark.text(f'{key}:')} ({' | '.join(kinds)})"


def _write_values(lark: Lark) -> None:
    """The rules of values, by type."""
    lark.free_until("fg_text", _QUOTE)
    lark.rule("FG_KEY", r"/[^{}\[\],:<>\s]+/")
    lark.rule("fg_string", f"{lark.text(_QUOTE)} fg_text")
    lark.rule("fg_integer", r"/-?(0|[1-9][0-9]*)/")
    lark.rule("fg_number", r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/")
    lark.rule("fg_boolean", '"true" | "false"')
    lark.rule("fg_null", '"null"')
    lark.rule("fg_array", '"[" (fg_value ("," fg_value)*)? "]"')
    lark.rule("fg_object", '"{" (FG_KEY ":" fg_value ("," FG_KEY ":" fg_value)*)? "}"')
    lark.rule("fg_value", "fg_string | fg_number | fg_boolean | fg_null | fg_array | fg_object")


FORMAT = FunctionGemma()
matches = FORMAT.matches
