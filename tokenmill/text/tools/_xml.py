"""Calls as tags: a function, and each parameter in tags of its own, its value as plain text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tokenmill.errors import ToolError
from tokenmill.text.tools._jsoncalls import random_id
from tokenmill.text.tools._lark import Choice, Frame, Lark, Tool, function_of, grammar, held_schema, name_of
from tokenmill.text.tools._output import Output
from tokenmill.text.tools._reader import (
    Broken,
    Emit,
    Markers,
    Reader,
    Reading,
    collected,
    expect,
    spaces,
    take,
    until,
    word,
)
from tokenmill.text.tools._values import STRING, dumps, inside, property_of, resolved, to_json, types_of

_NAME = re.compile(r"[^<>\n\r\t]+")
_EXACT = frozenset({"type", "title", "description", "default", "examples", "deprecated", "$comment"})


@dataclass(frozen=True)
class XmlCalls:
    """The spec of a format: `head` name `head_end`, then for each parameter `key` name `key_end` `value` text
    `value_end`, then `body_end` `end`. `lines`: one line break on both sides of a value belongs to the tags."""

    name: str
    matches: Callable[[str], bool]
    begin: str  # of a call
    head: str
    head_end: str
    key: str
    key_end: str
    value: str
    value_end: str
    body_end: str
    end: str
    lines: bool
    aliases: tuple[str, ...] = ()
    bare: str = ""
    new_id: Callable[[], str] = field(default=random_id)
    own_loop: bool = False

    @cached_property
    def starts(self) -> tuple[str, ...]:
        """A call's begin; its head alone if that is a tag of its own."""
        return (self.begin, self.head) if self.head else (self.begin,)

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens."""
        every = (self.begin, self.end, self.key, self.key_end, self.value, self.value_end)
        return tuple(text for text in every if len(text) > 1)

    @property
    def trigger(self) -> str:
        """A call's begin."""
        return self.begin

    @cached_property
    def _ends(self) -> Markers:
        return Markers(f"\n{self.value_end}", self.value_end) if self.lines else Markers(self.value_end)

    @cached_property
    def _key_ends(self) -> Markers:
        return Markers(self.key_end)

    def read(self, r: Reader, out: Output) -> Reading[None]:
        """One call."""
        yield from spaces(r)
        marked = bool((yield from take(r, self.begin)))
        yield from spaces(r)
        if self.head:
            yield from expect(r, self.head)
        name = out.check((yield from word(r, _NAME)).strip(), known=not marked)
        if self.head:
            yield from expect(r, self.head_end)
        yield from spaces(r)
        finish = self.body_end or self.end
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
            yield from take(r, self.end)

    def _parameter(self, r: Reader, out: Output, name: str, separator: str) -> Reading[None]:
        """A key and its value. Strings are told as they come, everything else once it is whole."""
        key, end = yield from collected(lambda emit: until(r, self._key_ends, emit))
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
            text, _ = yield from collected(lambda emit: self._value(r, emit))
            out.arguments(to_json(text, types))

    def _value(self, r: Reader, emit: Emit) -> Reading[None]:
        if not (yield from until(r, self._ends, emit)):
            raise Broken

    def grammar(
        self, tools: Sequence[Tool], choice: Choice, parallel: bool, special_ids: Mapping[str, int] | None = None
    ) -> tuple[str, str]:
        """See ToolFormat. A strict function may not ask of a string what tags cannot hold it to."""
        line = "\n" if self.head else ""
        begin = f"{self.begin}{line}{self.head}"
        frame = Frame(begin, f"\n{begin}", "", self.begin)
        return grammar(frame, self._write, tools, choice, parallel, special_ids)

    def _write(self, lark: Lark, rule: str, tool: Tool, choice: str) -> str:
        schema = held_schema(tool, choice)
        properties = schema.get("properties")
        required = schema.get("required")
        line = "\n" if self.lines else ""
        parts = [lark.text(f"{name_of(tool)}{self.head_end}{line}")]
        if isinstance(properties, Mapping):
            for i, (key, value) in enumerate(properties.items()):
                part = self._written(lark, f"{rule}_{i}", key, _Parameter(tool, schema, value))
                parts.append(part if isinstance(required, list) and key in required else f"({part})?")
        elif schema.get("additionalProperties") is not False:
            parts.append(f"({self._any(lark, rule)})*")
        parts.append(lark.text(f"{self.body_end}\n{self.end}" if self.body_end else self.end))
        return " ".join(parts)

    def _any(self, lark: Lark, rule: str) -> str:
        """A parameter that nothing is said about."""
        key = lark.rule(f"{rule}_KEY".upper(), "/[^<>\\s]+/")
        value = lark.free_until(f"{rule}_any", self._close())
        return f"{lark.text(self.key)} {key} {lark.text(self._open())} {value}"

    def _open(self) -> str:
        line = "\n" if self.lines or self.value else ""
        return f"{self.key_end}{line}{self.value}"

    def _close(self) -> str:
        return f"\n{self.value_end}\n" if self.lines else f"{self.value_end}\n"

    def _written(self, lark: Lark, rule: str, key: str, parameter: _Parameter) -> str:
        """The expression for one parameter."""
        head = lark.text(f"{self.key}{key}{self._open()}")
        texts = parameter.texts()
        if texts:
            options = " | ".join(lark.text(text + self._close()) for text in texts)
            return f"{head} ({options})"
        types = types_of(parameter.schema, parameter.root)
        if "string" not in types:
            return f"{head} {lark.json(rule, parameter.rooted())} {lark.text(self._close())}"
        parameter.check(key)
        return f"{head} {lark.free_until(rule, self._close())}"


class _Parameter:
    """One parameter of a tool: its schema, and the schema that references in it point into."""

    __slots__ = ("root", "schema", "tool")

    def __init__(self, tool: Tool, root: Mapping[str, Any], schema: Any) -> None:
        self.tool, self.root, self.schema = tool, root, schema

    def texts(self) -> list[str]:
        """The texts it is one of, if its schema lists strings."""
        if not isinstance(self.schema, Mapping):
            return []
        listed = self.schema.get("enum") or ([self.schema["const"]] if "const" in self.schema else [])
        return listed if all(isinstance(value, str) for value in listed) else []

    def rooted(self) -> Any:
        """Its schema with the definitions that it may refer to."""
        if not isinstance(self.schema, Mapping):
            return self.schema
        shared = {key: self.root[key] for key in ("$defs", "definitions") if key in self.root}
        return {**shared, **self.schema}

    def check(self, key: str) -> None:
        """Raises ToolError if a strict function's text is held to more than a text's end."""
        found = self._inexact(self.schema) if function_of(self.tool).get("strict") else ""
        if found:
            raise ToolError(
                f"The strict function {name_of(self.tool)} cannot be served exactly: parameters.properties.{key}."
                f"{found} is not supported for text in this model's tool format",
                param="tools",
            )

    def _inexact(self, schema: Any, depth: int = 0) -> str:
        """A keyword that free text may break; "" if there is none."""
        if not isinstance(schema, Mapping) or depth > len(_EXACT):
            return ""
        for keyword, value in schema.items():
            if keyword in ("anyOf", "oneOf") and isinstance(value, list):
                inner = next(filter(None, (self._inexact(one, depth + 1) for one in value)), "")
            elif keyword == "$ref" and isinstance(value, str):
                inner = self._inexact(resolved(value, self.root), depth + 1)
            else:
                inner = "" if keyword in _EXACT else keyword
            if inner:
                return inner
        return ""
