"""Calls as tags: a function, and each parameter in tags of its own, its value as plain text.

A value may contain any text, also the format's own tags. Its closing tag ends it if another tag or the answer's end
follows. If that tag is missing, the value ends at the tag of another of the function's parameters, or at the end of the
call if the call's closing mark or another call follows. A value that contains one of these cannot be distinguished from
calls, and is read as calls. Under a grammar, the first closing tag ends a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

from tokenmill.text.functions import STRING, Tool, name_of, names_of, others_of, property_of, types_of
from tokenmill.text.lark import Lark
from tokenmill.text.output import DeltaBuilder
from tokenmill.text.reader import (
    NOTHING,
    Broken,
    Emit,
    Markers,
    Reading,
    TextCursor,
    ahead,
    before,
    collected,
    expect,
    spaces,
    take,
    take_end,
    until,
    word,
)
from tokenmill.text.tools._calls import Calls, Style
from tokenmill.text.tools._part import Part
from tokenmill.text.tools._values import dumps, ends_in_text, inside, to_json
from tokenmill.text.tools.base import GrammarRequest

_NAME = re.compile(r"[^<>\"\n\r\t]+")
_ANY_KEY = r'/[^<>"\s]+/'


@dataclass(frozen=True, kw_only=True)
class XmlStyle(Style):
    """Style `head` name `head_end`, then for each parameter `key` name `key_end` `value` text `value_end`, then
    `body_end`. `lines`: one line break on both sides of a value belongs to the tags. A format's trigger is its `head`,
    or the beginning of a call if a name follows that at once."""

    head: str = ""
    head_end: str = ""
    key: str
    key_end: str
    value: str = ""
    value_end: str
    body_end: str = ""
    lines: bool = False
    has_trigger: ClassVar[bool] = True

    def read(self, form: Calls, r: TextCursor, out: DeltaBuilder) -> Reading[None]:
        """Read one call. Without a mark, only functions that exist are called."""
        begin, end = form.starts[0], form.ends[0]
        yield from spaces(r)
        marked = bool((yield from take(r, begin)))
        yield from spaces(r)
        if self.head:
            yield from expect(r, self.head)
        name = out.check((yield from word(r, _NAME)).strip(), known=not marked)
        if self.head:
            yield from expect(r, self.head_end)
        yield from spaces(r)
        finish = self.body_end or end
        tag = yield from expect(r, self.key, finish)
        out.call(name)
        out.arguments("{")
        given: list[str] = []
        while tag == self.key:
            r.check()
            yield from self._parameter(form, r, out, name, given)
            yield from spaces(r)
            r.check()
            tag = yield from expect(r, self.key, finish, end)
        out.arguments("}")
        out.done()
        r.settle()
        if tag != end:
            yield from take_end(r, end)

    def _parameter(self, form: Calls, r: TextCursor, out: DeltaBuilder, name: str, given: list[str]) -> Reading[None]:
        """Read a key and its value. Strings are emitted as they come, other values once they are whole. `given`: the
        keys before, to which this one is added."""
        key, end = yield from collected(lambda emit: until(r, Markers(self.key_end), emit))
        if not end or "\n" in key:
            raise Broken
        if self.value:
            yield from spaces(r)
            yield from expect(r, self.value)
        if self.lines:
            yield from take(r, "\n")
        schema = out.schemas.get(name)
        types = types_of(property_of(schema, key), schema)
        out.arguments(f"{', ' if given else ''}{dumps(key)}: ")
        given.append(key)
        ends = _Ends(self, form, frozenset() if out.held else names_of(schema).difference(given), out.held)
        if types == STRING:
            out.arguments('"')
            yield from ends.value(r, lambda piece: out.arguments(inside(piece)), lambda: False)
            out.arguments('"')
        else:
            parts: list[str] = []
            in_json = "string" not in types
            yield from ends.value(r, parts.append, lambda: in_json and ends_in_text("".join(parts)))
            out.arguments(to_json("".join(parts), types))

    def write(self, lark: Lark, rule: str, tool: Tool, request: GrammarRequest) -> str:
        """See Style. A strict function may not constrain a text in ways that tags cannot enforce."""
        schema = request.schema_of(tool)
        Part(tool, schema, schema).check_object()
        parts = [lark.text(f"{name_of(tool)}{self.head_end}\n")]
        others, required = others_of(schema), schema.get("required")
        if others is not False:
            key = f"{lark.text(self.key)} {lark.rule('KEY', _ANY_KEY)}"
            part = Part(tool, schema, others)
            parts.append(f"({key} {self._value_of(lark, f'{rule}_other', part, 'additionalProperties')})*")
        for i, (name, value) in enumerate((schema.get("properties") or {}).items()):
            key, part = lark.text(f"{self.key}{name}"), Part(tool, schema, value)
            written = f"{key} {self._value_of(lark, f'{rule}_{i}', part, f'properties.{name}')}"
            parts.append(written if isinstance(required, list) and name in required else f"({written})?")
        if self.body_end:
            parts.append(lark.text(self.body_end + "\n"))
        return " ".join(parts)

    def _value_of(self, lark: Lark, rule: str, part: Part, path: str) -> str:
        """Return the expression for the text behind a parameter's name. `path`: of its schema."""
        line = "\n" if self.lines or self.value else ""
        head, end = lark.text(f"{self.key_end}{line}{self.value}"), f"{self.value_end}\n"
        close = "\n" + end if self.lines else end
        if texts := part.texts():
            return f"{head} ({' | '.join(lark.text(text + close) for text in texts)})"
        if "string" not in part.types:
            return f"{head} {lark.json(rule, part.alone())} {lark.text(close)}"
        part.check(path)
        return f"{head} {lark.free('value', (self.value_end,)).text} {lark.text(end)}"


class _Ends(NamedTuple):
    """Ends of a value. `missing`: the names of parameters that may follow it without a closing tag."""

    style: XmlStyle
    form: Calls
    missing: frozenset[str]
    held: bool

    def value(self, r: TextCursor, emit: Emit, in_text: Callable[[], bool]) -> Reading[None]:
        """Emit a value and reads its closing tag. `in_text`: true if what was emitted cannot be all of it."""
        marks = _marks(self.style, self.form.ends[0], self.held)
        while found := (yield from before(r, marks, emit, settles=False)):
            if (yield from self._closes(r, found)) and not in_text():
                r.pos += len(found) if found.endswith(self.style.value_end) else 0
                return
            emit(found)
            r.pos += len(found)
        raise Broken

    def _closes(self, r: TextCursor, found: str) -> Reading[bool]:
        """Return True if `found`, which comes next, is not part of the value."""
        tag, size, style = found.lstrip("\n"), len(found), self.style
        end, starts = self.form.ends[0], self.form.starts
        if tag == style.value_end:
            tags = (style.key, style.body_end or end, end, *starts)
            return (yield from ahead(r, *tags, offset=size)) is not None
        if tag == style.key:
            names = [f"{name}{style.key_end}" for name in self.missing]
            return bool(names and (yield from ahead(r, *names, offset=size, skipped=NOTHING)))
        behind = yield from ahead(r, *starts, *((end,) if tag != end else ()), offset=size)
        return bool(behind) or (behind == "" and not style.body_end)


@cache
def _marks(style: XmlStyle, end: str, held: bool) -> Markers:
    """Return the tags that may close a value. With a grammar it is the closing tag alone."""
    tags = () if held else (style.key, style.body_end or end, end)
    closing = (style.value_end, *([f"\n{style.value_end}"] if style.lines else []))
    return Markers(*dict.fromkeys((*closing, *tags, *(f"\n{tag}" for tag in tags))))
