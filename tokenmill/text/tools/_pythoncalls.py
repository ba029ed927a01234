"""Calls as Python writes them: [name(key=value, …), …]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tokenmill.text.tools._jsoncalls import random_id
from tokenmill.text.tools._lark import Choice, Frame, Lark, Tool, grammar, held_schema, name_of
from tokenmill.text.tools._output import Output
from tokenmill.text.tools._python import read_call
from tokenmill.text.tools._reader import Reader, Reading, expect, spaces, take
from tokenmill.text.tools._values import types_of


@dataclass(frozen=True)
class PythonCalls:
    """The spec of a format: see JsonCalls. Without a marker, calls stand in a list at the answer's beginning."""

    name: str
    matches: Callable[[str], bool]
    opening: str
    between: str
    closing: str
    trigger: str
    starts: tuple[str, ...]
    ends: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    bare: str = ""
    new_id: Callable[[], str] = field(default=random_id)
    own_loop: bool = False

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens."""
        return (*self.starts, *self.ends)

    def read(self, r: Reader, out: Output) -> Reading[None]:
        """A marker, calls in a list or one below the other, an end."""
        yield from spaces(r)
        marked = bool(self.starts) and bool((yield from take(r, *self.starts)))
        yield from spaces(r)
        listed = bool((yield from take(r, "["))) if marked else bool((yield from expect(r, "[")))
        while True:
            yield from spaces(r)
            yield from read_call(r, out, known=not marked)
            yield from spaces(r)
            if self.ends and (yield from take(r, *self.ends)):
                return
            if listed:
                if not (yield from take(r, ",")):
                    break
            elif not (yield from self._another(r)):
                return
        yield from expect(r, "]")
        yield from spaces(r)
        if self.ends:
            yield from take(r, *self.ends)

    def _another(self, r: Reader) -> Reading[bool]:
        """True if a further call may follow without a list."""
        yield from take(r, ";", ",")
        yield from spaces(r)
        return r.pos < len(r.text) and (r.text[r.pos].isalpha() or r.text[r.pos] == "_")

    def grammar(
        self, tools: Sequence[Tool], choice: Choice, parallel: bool, special_ids: Mapping[str, int] | None = None
    ) -> tuple[str, str]:
        """See ToolFormat."""
        frame = Frame(self.opening, self.between, self.closing, self.trigger)
        return grammar(frame, self._write, tools, choice, parallel, special_ids, self.bare)

    def _write(self, lark: Lark, rule: str, tool: Tool, choice: str) -> str:
        schema = held_schema(tool, choice)
        properties = schema.get("properties")
        given = properties if isinstance(properties, Mapping) else {}
        required = schema.get("required")
        wanted = [key for key in given if isinstance(required, list) and key in required]
        optional = [key for key in given if key not in wanted]
        parts = [self._argument(lark, f"{rule}_{i}", key, schema) for i, key in enumerate(wanted + optional)]
        firm, loose = parts[: len(wanted)], parts[len(wanted) :]
        body = lark.text(f"{name_of(tool)}(")
        if firm:
            body += " " + ' ", " '.join(firm) + "".join(f' (", " {part})?' for part in loose)
        elif loose:  # any of them may be the first
            tails = [part + "".join(f' (", " {later})?' for later in loose[i + 1 :]) for i, part in enumerate(loose)]
            body += f" ({' | '.join(tails)})?"
        return f'{body} ")"'

    def _argument(self, lark: Lark, rule: str, key: str, schema: Mapping[str, Any]) -> str:
        """key=value; true and false as Python writes them."""
        value = schema["properties"][key]
        if types_of(value, schema) == {"boolean"}:
            written = '("True" | "False")'
        else:
            shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
            written = lark.json(rule, {**shared, **value} if isinstance(value, Mapping) else value)
        return f"{lark.text(f'{key}=')} {written}"
