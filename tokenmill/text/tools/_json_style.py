"""Calls as JSON objects with a name and arguments, alone or in a list. Marks inside of strings mean nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenmill.grammar.patterns import literal
from tokenmill.text.functions import Tool, moved, name_of
from tokenmill.text.lark import SPACES, Lark, quoted
from tokenmill.text.output import DeltaBuilder
from tokenmill.text.reader import (
    Broken,
    Reading,
    TextCursor,
    ahead,
    collected,
    expect,
    peek,
    spaces,
    surplus,
    take,
    take_end,
)
from tokenmill.text.tools._calls import Bare, Calls, Style
from tokenmill.text.tools._json import EXACT, json_value, read_arguments, read_string
from tokenmill.text.tools.base import GrammarRequest

_COLON, _COMMA = f"{SPACES}:{SPACES}", f"{SPACES},{SPACES}"
_KEY = ('"', "'", "}")
_BESIDE = frozenset({"name", "tool_name", "type", "id", "tool_call_id", "index"})  # keys of calls without arguments
_CURLY = re.compile(r"[\s}]*")


@dataclass(frozen=True)
class JsonStyle(Style):
    """Style {"name": …, "arguments": …}. The first of the keys are those that the model is made to write."""

    name_keys: tuple[str, ...] = ("name",)
    arguments_keys: tuple[str, ...] = ("arguments", "parameters")
    separators: tuple[str, ...] = (",",)
    lead: str = ""  # text before the name in each object that the model is made to write; {index}: a number

    def read(self, form: Calls, r: TextCursor, out: DeltaBuilder) -> Reading[None]:
        """Read a mark, calls, and an end. Without a mark, only functions that exist are called."""
        yield from spaces(r)
        marked = bool((yield from take(r, *form.starts)))
        yield from self.read_calls(form, r, out, form.known or not marked)

    def read_calls(self, form: Calls, r: TextCursor, out: DeltaBuilder, known: bool) -> Reading[None]:
        """Read calls behind a mark, in a list or one behind the other. `known`: the mark proves nothing."""
        marks = EXACT if out.held else (*form.ends, *form.starts)
        yield from spaces(r)
        listed = bool((yield from take(r, "[")))
        while True:
            yield from spaces(r)
            yield from self._object(r, out, known, (*marks, "]") if marks and listed else marks)
            r.settle()
            if marks:
                yield from surplus(r, (*marks, *self.separators, "{", *("]" if listed else ())), _CURLY)
            yield from spaces(r)
            if not (yield from take(r, *self.separators)) and not (marks and (yield from peek(r)) == "{"):
                break
            yield from spaces(r)
            if listed and marks and (yield from peek(r)) == "]":
                break
        if listed:
            yield from take(r, "]")
        if marks:
            yield from surplus(r, marks)
        if form.ends:
            yield from take_end(r, *form.ends)

    def _object(self, r: TextCursor, out: DeltaBuilder, known: bool, marks: tuple[str, ...]) -> Reading[None]:
        """Read one call. Once its arguments are whole it is a call, whatever follows. If no mark distinguishes it from
        other JSON, its name must come first, and it must have arguments."""
        yield from expect(r, "{")
        name: str | None = None
        held: str | None = None
        emitted = False
        keys: list[str] = []
        while (yield from _has_more(r, bool(keys), emitted, marks)):
            key = yield from _string(r, known, marks)
            keys.append(key)
            yield from spaces(r)
            yield from expect(r, ":")
            yield from spaces(r)
            if key in self.name_keys and name is None:
                name = out.check((yield from _string(r, known, marks)), known)
            elif known and name is None:
                if keys != ["type"] or (yield from _string(r, known, marks)) != "function":
                    raise Broken
            elif key not in self.arguments_keys or emitted or held is not None:
                yield from collected(lambda emit: json_value(r, emit, marks))
            elif name is None:
                held, _ = yield from collected(lambda emit: read_arguments(r, emit, marks))
            else:
                yield from emit_call(r, out, name, marks=marks)
                emitted = True
        if not emitted:
            if name is None or (held is None and (known or not _BESIDE.issuperset(keys))):
                raise Broken
            out.call(name)
            out.arguments("{}" if held is None else held)
            out.done()

    def write(self, lark: Lark, rule: str, tool: Tool, request: GrammarRequest) -> str:
        """See Style."""
        before, index, after = self.lead.partition("{index}")
        head = f"{quoted('{' + before)} {lark.rule('INDEX', '/[0-9]{1,3}/')} " if index else ""
        named = f"{quoted(self.name_keys[0])}: {quoted(name_of(tool))}, {quoted(self.arguments_keys[0])}: "
        head += quoted(f"{after if index else '{' + before}{named}")
        return f"{head} {lark.json(f'{rule}_arguments', request.schema_of(tool))} {quoted('}')}"

    def beside_json(self, lark: Lark, rule: str, tool: Tool, request: GrammarRequest) -> str:
        """See Style."""
        key, arguments, schema = self.name_keys[0], self.arguments_keys[0], request.schema_of(tool)
        options = schema.pop("x-guidance", {})
        given = {key: {"const": name_of(tool)}, arguments: moved(schema, f"#/properties/{arguments}")}
        whole = {"type": "object", "properties": given, "required": list(given), "additionalProperties": False}
        return lark.json(f"{rule}_object", {**whole, "x-guidance": options})

    def bare(self, form: Calls, lark: Lark, request: GrammarRequest) -> Bare:
        """See Style. Any white space is allowed."""
        kind = f'("type"{_COLON}"function"{_COMMA})?'
        begin = rf'{SPACES}\{{{SPACES}{kind}"({_any(self.name_keys)})"{_COLON}"'
        listed = rf"{SPACES}\[{begin}"
        behind = f'{_COMMA}"({_any(self.arguments_keys)})"{_COLON}'
        lark.rule("HEAD", f"/{begin}/")
        lark.rule("LISTED", f"/{listed}/")
        names = [quoted(name_of(tool))[1:-1] for tool in request.tools]
        behind = f'"{_COMMA}"({_any(self.arguments_keys)})"{_COLON}'
        named = [lark.rule(f"NAMED_{i}", f"/{literal(name)}{behind}/") for i, name in enumerate(names)]
        lark.rule("first", " | ".join(f'{name} call_{i}_arguments "}}"' for i, name in enumerate(named)))
        groups = []
        for head, between, closing in ("HEAD", form.between, ""), ("LISTED", ", ", "]"):
            more = f"({lark.text(between)} call)*" if request.parallel else ""
            groups.append(f"{head} first {more} {lark.text(closing)}".rstrip())
        firsts = "".join(literal(text[0]) for text in form.triggers)
        barred = "|".join(literal(name.partition('"')[0]) for name in names)
        lark.rule("OTHER", f'/[^"{firsts}]+/ & ~/{barred}/')
        lark.rule("QUOTED", f'/"[^{firsts}]*/')
        glue = "" if form.closing else f"{SPACES}({_any(self.separators)})"
        return Bare(" | ".join(groups), f"({begin}|{listed})", "(HEAD | LISTED) OTHER? QUOTED?", glue)


def _any(texts: tuple[str, ...]) -> str:
    return "|".join(map(literal, texts))


def _has_more(r: TextCursor, behind: bool, emitted: bool, marks: tuple[str, ...]) -> Reading[bool]:
    """Read the text before an object's next key, or the object's end. `behind`: another key precedes. `emitted`: its
    arguments are complete, so its brace may be missing."""
    yield from spaces(r)
    if (yield from take(r, "}")):
        return False
    if behind:
        if emitted and not ((yield from peek(r)) == "," and (yield from ahead(r, *_KEY, offset=1))):
            return False
        yield from expect(r, ",")
        yield from spaces(r)
        if marks and (yield from take(r, "}")):
            return False
    return True


def _string(r: TextCursor, known: bool, marks: tuple[str, ...]) -> Reading[str]:
    """Read a string. Raises Broken if none comes next. If no mark distinguishes a call from other JSON, a grammar
    cannot either if the string has escapes that are not necessary."""
    text, value = yield from read_string(r, marks)
    if known and not marks and quoted(value) != text:
        raise Broken
    return value


def emit_call(
    r: TextCursor, out: DeltaBuilder, name: str, call_id: str | None = None, marks: tuple[str, ...] = EXACT
) -> Reading[None]:
    """Read JSON arguments and emit a call with them. It begins with their first character."""
    begun = False

    def emit(piece: str) -> None:
        nonlocal begun
        if not begun:
            out.call(name, call_id)
            begun = True
        out.arguments(piece)

    yield from read_arguments(r, emit, marks)
    out.done()
    r.settle()
