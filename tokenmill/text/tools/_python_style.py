"""Calls as Python writes them: [name(key=value, …), …].

Quotes inside of a string need no backslash: it ends at one with a comma, a colon or a closing bracket behind it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenmill.grammar.patterns import literal
from tokenmill.text.functions import Tool, alone, keys_of, name_of, others_of
from tokenmill.text.lark import SPACES, Lark
from tokenmill.text.output import DeltaBuilder
from tokenmill.text.reader import Reading, TextCursor, ahead, expect, spaces, surplus, take, take_end
from tokenmill.text.tools._calls import Bare, Calls, Style, entries
from tokenmill.text.tools._part import Part
from tokenmill.text.tools._python import PRINT, read_call
from tokenmill.text.tools.base import GrammarRequest

_CLOSING = re.compile(r"[\s)\]]*")


@dataclass(frozen=True)
class PythonStyle(Style):
    """Style name(key=value, …). Without a mark, calls stand in a list at the answer's beginning."""

    def read(self, form: Calls, r: TextCursor, out: DeltaBuilder) -> Reading[None]:
        """Read a mark, calls in a list or one below the other, and an end."""
        yield from spaces(r)
        marked = bool((yield from take(r, *form.starts)))
        yield from spaces(r)
        listed = bool((yield from take(r, "["))) if marked else bool((yield from expect(r, "[")))
        while True:
            yield from spaces(r)
            yield from read_call(r, out, known=not marked)
            yield from spaces(r)
            if form.ends and (yield from ahead(r, *form.ends)):
                break
            if not ((yield from take(r, ",")) if listed else (yield from self._another(r))):
                break
        if listed:
            yield from take(r, "]")
        if not out.held:
            yield from surplus(r, form.ends or ("]",), _CLOSING)
        if form.ends:
            yield from take_end(r, *form.ends)

    def _another(self, r: TextCursor) -> Reading[bool]:
        """Return True if a further call may follow without a list."""
        yield from take(r, ";", ",")
        yield from spaces(r)
        return r.pos < len(r.text) and (r.text[r.pos].isalpha() or r.text[r.pos] == "_")

    def write(self, lark: Lark, rule: str, tool: Tool, request: GrammarRequest) -> str:
        """See Style."""
        return f"{lark.text(f'{name_of(tool)}(')} {self._arguments(lark, rule, tool, request)}"

    def bare(self, form: Calls, lark: Lark, request: GrammarRequest) -> Bare:
        """See Style."""
        begin = rf"{SPACES}\[{SPACES}"
        heads = []
        for i, tool in enumerate(request.tools):
            head = lark.rule(f"BARE_{i}", rf"/{begin}{literal(name_of(tool))}\(/")
            heads.append(f"{head} {self._arguments(lark, f'call_{i}', tool, request)}")
        more = '(", " call)*' if request.parallel else ""
        names = "|".join(map(literal, (*map(name_of, request.tools), PRINT)))
        return Bare(f'({" | ".join(heads)}) {more} "]"', rf"{begin}({names}){SPACES}\(")

    def _arguments(self, lark: Lark, rule: str, tool: Tool, request: GrammarRequest) -> str:
        """Return the expression for the text behind the opening bracket."""
        schema = request.schema_of(tool)
        Part(tool, schema, schema).check_object()
        others = others_of(schema)
        if others is not False:
            value = _any_value(lark) if others is True else lark.json(f"{rule}_other", alone(others, schema))
            argument = f'{lark.rule("PY_WORD", "/[A-Za-z_][A-Za-z0-9_]*/")} "=" {value}'
            return f'({argument} (", " {argument})*)? ")"'
        firm, loose = keys_of(schema)
        made = [self._argument(lark, f"{rule}_{i}", key, schema) for i, key in enumerate(firm + loose)]
        return f'{entries(made[: len(firm)], made[len(firm) :], ", ")} ")"'.lstrip()

    def _argument(self, lark: Lark, rule: str, key: str, schema: Mapping[str, Any]) -> str:
        """Return the expression for key=value. A value is written as JSON, except a truth value."""
        value = schema["properties"][key]
        kind = value.get("type") if isinstance(value, Mapping) and not value.keys() & {"enum", "const"} else None
        written = '("True" | "False")' if kind == "boolean" else lark.json(rule, alone(value, schema))
        return f"{lark.text(f'{key}=')} {written}"


def _any_value(lark: Lark) -> str:
    """Return a rule for any value."""
    lark.rule("PY_TEXT", r"""/"([^"\\\n]|\\["\\nt])*"|'([^'\\\n]|\\['\\nt])*'/""")
    lark.rule("PY_NUMBER", r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/")
    lark.rule("py_list", '"[" (py_value (", " py_value)*)? "]"')
    lark.rule("py_entry", 'PY_TEXT ": " py_value')
    lark.rule("py_dict", '"{" (py_entry (", " py_entry)*)? "}"')
    return lark.rule("py_value", 'PY_TEXT | PY_NUMBER | "True" | "False" | "None" | py_list | py_dict')
