"""Calls as call:name{key:value}, where strings stand between <escape> tags and keys need no quotes.

A string may hold the tag: it ends at one with a comma or a closing bracket behind it, a key at one with a colon.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenmill.text.functions import ALL, Tool, keys_of, name_of, others_of
from tokenmill.text.lark import Lark
from tokenmill.text.output import DeltaBuilder
from tokenmill.text.reader import (
    Broken,
    Emit,
    Markers,
    Reading,
    TextCursor,
    ahead,
    before,
    expect,
    peek,
    spaces,
    take_end,
    word,
)
from tokenmill.text.tools._calls import Calls, Style, entries
from tokenmill.text.tools._literals import Literals
from tokenmill.text.tools._part import Part
from tokenmill.text.tools._values import dumps
from tokenmill.text.tools.base import GrammarRequest

QUOTE = "<escape>"
_NAME = re.compile(r"[^{}<>\s]+")
_KEY = re.compile(r"[^{}\[\],:<>]+")
_QUOTES = Markers(QUOTE)
_SCALARS = frozenset({"integer", "number", "boolean", "null"})
_OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_ANY_KEY = r"/[^{}\[\],:<>\s]+/"
_MOST_DEPTH = 8


class _Escaped(Literals):
    """Literals with tags for quotes."""

    def begins_text(self, char: str) -> bool:
        """See Literals."""
        return char == QUOTE[0]

    def text(self, r: TextCursor, emit: Emit, behind: tuple[str, ...]) -> Reading[None]:
        """See Literals."""
        yield from expect(r, QUOTE)
        while (yield from before(r, _QUOTES, emit, settles=False)):
            if (yield from ahead(r, *behind, offset=len(QUOTE))) is not None:
                r.pos += len(QUOTE)
                return
            emit(QUOTE)
            r.pos += len(QUOTE)
        raise Broken

    def key(self, r: TextCursor, emit: Emit) -> Reading[None]:
        """Read a text or a word. See Literals."""
        if (yield from peek(r)) == QUOTE[0]:
            yield from self.quoted(r, emit, (":",))
        else:
            emit(dumps((yield from word(r, _KEY)).strip()))


_LITERALS = _Escaped()


@dataclass(frozen=True)
class EscapedStyle(Style):
    """Style with one call between the format's marks."""

    has_trigger: ClassVar[bool] = True

    def read(self, form: Calls, r: TextCursor, out: DeltaBuilder) -> Reading[None]:
        """See Style."""
        yield from spaces(r)
        yield from expect(r, form.trigger)
        yield from spaces(r)
        yield from expect(r, "call:")
        name = out.check((yield from word(r, _NAME)))
        if (yield from peek(r)) != "{":
            raise Broken
        out.call(name)
        yield from _LITERALS.entries(r, out.arguments)
        out.done()
        r.settle()
        yield from take_end(r, *form.ends)

    def write(self, lark: Lark, rule: str, tool: Tool, request: GrammarRequest) -> str:
        """See Style. A strict function's schema may have only keywords that these literals can enforce."""
        schema = request.schema_of(tool)
        return f"{lark.text(f'call:{name_of(tool)}')} {_object(lark, rule, Part(tool, schema, schema), '')}"


def _value(lark: Lark, rule: str, part: Part, path: str, depth: int) -> str:
    """Return the expression for a value. `rule`: a prefix for the names of its rules."""
    if values := part.values():
        return f"({' | '.join(lark.text(_written(value)) for value in values)})"
    schema = part.followed()
    options = schema.get("anyOf", schema.get("oneOf")) if isinstance(schema, Mapping) else None
    if isinstance(options, list) and depth < _MOST_DEPTH:
        parts = [part._replace(schema=one) for one in options]
        return f"({' | '.join(_value(lark, f'{rule}_{i}', one, path, depth + 1) for i, one in enumerate(parts))})"
    if part.types == ALL or depth >= _MOST_DEPTH:
        part.check(path)
        return _any_value(lark)
    part = part._replace(schema=schema)
    kinds = []
    if part.types & _SCALARS:
        kinds.append(lark.json(f"{rule}_scalar", {**part.alone(), "type": sorted(part.types & _SCALARS)}))
    if "string" in part.types:
        part.check(path, _OF_NUMBERS)
        kinds.append(_any_text(lark))
    if "array" in part.types:
        part.check(path, {"items"})
        item = _value(lark, f"{rule}_item", part._replace(schema=schema.get("items", {})), f"{path}.items", depth + 1)
        kinds.append(f'"[" ({item} ("," {item})*)? "]"')
    if "object" in part.types:
        kinds.append(_object(lark, rule, part, path, depth))
    return f"({' | '.join(kinds)})"


def _object(lark: Lark, rule: str, part: Part, path: str, depth: int = 0) -> str:
    """Return the expression for an object: its properties in their order."""
    part.check_object(path)
    others = others_of(part.schema)
    if others is not False:
        value = _value(lark, f"{rule}_other", part._replace(schema=others), f"{path}.additionalProperties", depth + 1)
        entry = f'{lark.rule("ANY_KEY", _ANY_KEY)} ":" {value}'
        return f'"{{" ({entry} ("," {entry})*)? "}}"'
    firm, loose = keys_of(part.schema)
    made = []
    for i, key in enumerate(firm + loose):
        where = f"{path}.properties.{key}".lstrip(".")
        value = _value(lark, f"{rule}_{i}", part._replace(schema=part.schema["properties"][key]), where, depth + 1)
        made.append(f"{lark.text(f'{_written_key(key)}:')} {value}")
    return f'"{{" {entries(made[: len(firm)], made[len(firm) :], ",")} "}}"'


def _any_text(lark: Lark) -> str:
    """Return a rule for a text."""
    return lark.rule("any_text", f"{lark.text(QUOTE)} {lark.free('text', (QUOTE,)).text} {lark.text(QUOTE)}")


def _any_value(lark: Lark) -> str:
    """Return a rule for any value."""
    lark.rule("ANY_KEY", _ANY_KEY)
    lark.rule("ANY_NUMBER", r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/")
    lark.rule("any_list", '"[" (any_value ("," any_value)*)? "]"')
    lark.rule("any_object", '"{" (ANY_KEY ":" any_value ("," ANY_KEY ":" any_value)*)? "}"')
    words = '"true" | "false" | "null"'
    return lark.rule("any_value", f"{_any_text(lark)} | ANY_NUMBER | {words} | any_list | any_object")


def _written_key(key: str) -> str:
    return key if _KEY.fullmatch(key) and key == key.strip() else f"{QUOTE}{key}{QUOTE}"


def _written(value: Any) -> str:
    """Return a value as the model writes it."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{_written_key(key)}:{_written(one)}' for key, one in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return json.dumps(value)
