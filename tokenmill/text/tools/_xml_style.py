"""Calls as tags: a function, and each parameter in tags of its own, its value as plain text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from tokenmill.text.functions import STRING, Tool, name_of, others_of, property_of, types_of
from tokenmill.text.lark import Lark
from tokenmill.text.output import Output
from tokenmill.text.reader import Broken, Emit, Markers, Reader, Reading, collected, expect, spaces, take, until, word
from tokenmill.text.tools._calls import Calls, Style
from tokenmill.text.tools._part import Part
from tokenmill.text.tools._values import dumps, ends_in_text, inside, to_json
from tokenmill.text.tools.base import Asked

_NAME = re.compile(r"[^<>\"\n\r\t]+")
_ANY_KEY = r'/[^<>"\s]+/'


@dataclass(frozen=True, kw_only=True)
class XmlStyle(Style):
    """`head` name `head_end`, then for each parameter `key` name `key_end` `value` text `value_end`, then `body_end`.
    `lines`: one line break on both sides of a value belongs to the tags. A format's trigger is its `head`, or the
    begin of a call where a name follows that at once."""

    head: str = ""
    head_end: str = ""
    key: str
    key_end: str
    value: str = ""
    value_end: str
    body_end: str = ""
    lines: bool = False
    has_trigger: ClassVar[bool] = True

    def read(self, form: Calls, r: Reader, out: Output) -> Reading[None]:
        """One call. Without a mark, only functions that exist are called."""
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
        first = True
        while tag == self.key:
            yield from self._parameter(r, out, name, "" if first else ", ")
            first = False
            yield from spaces(r)
            tag = yield from expect(r, self.key, finish)
        out.arguments("}")
        out.done()
        r.settle()
        if self.body_end:
            yield from spaces(r)
            yield from take(r, end)

    def _parameter(self, r: Reader, out: Output, name: str, separator: str) -> Reading[None]:
        """A key and its value. Strings are told as they come, everything else once it is whole."""
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
        out.arguments(f"{separator}{dumps(key)}: ")
        if types == STRING:
            out.arguments('"')
            yield from self._value(r, lambda piece: out.arguments(inside(piece)))
            out.arguments('"')
        else:
            text, end = yield from collected(lambda emit: self._value(r, emit))
            while "string" not in types and ends_in_text(text):  # so it was no tag
                more, next_end = yield from collected(lambda emit: self._value(r, emit))
                text, end = text + end + more, next_end
            out.arguments(to_json(text, types))

    def _value(self, r: Reader, emit: Emit) -> Reading[str]:
        """Emits text up to the end of a value, and gives that."""
        ends = Markers(f"\n{self.value_end}", self.value_end) if self.lines else Markers(self.value_end)
        end = yield from until(r, ends, emit)
        if not end:
            raise Broken
        return end

    def write(self, lark: Lark, rule: str, tool: Tool, asked: Asked) -> str:
        """See Style. A strict function may not ask of a text what tags cannot hold it to."""
        schema = asked.schema_of(tool)
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
        """The expression for what follows a parameter's name. `path`: of its schema."""
        line = "\n" if self.lines or self.value else ""
        head, end = lark.text(f"{self.key_end}{line}{self.value}"), f"{self.value_end}\n"
        close = "\n" + end if self.lines else end
        if texts := part.texts():
            return f"{head} ({' | '.join(lark.text(text + close) for text in texts)})"
        if "string" not in part.types:
            return f"{head} {lark.json(rule, part.alone())} {lark.text(close)}"
        part.check(path)
        return f"{head} {lark.free('value', (self.value_end,)).text} {lark.text(end)}"
