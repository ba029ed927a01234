"""Writes grammars in llguidance's Lark, and the frame that all formats' grammars share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenmill.errors import ToolError
from tokenmill.text.tools._reader import alternatives

Tool = Mapping[str, Any]
"""A tool as OpenAI's API takes it: {"type": "function", "function": {"name", "parameters", …}}."""
_SPACING = {"whitespace_pattern": "[ \\n\\t]{1,16}"}  # without a bound, a model can go on with spaces for ever


class Lark:
    """Collects rules. `special_ids`: special tokens by text."""

    def __init__(self, special_ids: Mapping[str, int] | None = None) -> None:
        self._ids = special_ids or {}
        self._special = re.compile(f"({alternatives(list(self._ids))})" if self._ids else r"((?!))")
        self._rules: dict[str, str] = {}

    def text(self, text: str) -> str:
        """An expression for exactly this text: special tokens by id, the rest quoted."""
        parts = [part for part in self._special.split(text) if part]
        return " ".join(f"<[{self._ids[part]}]>" if part in self._ids else quoted(part) for part in parts)

    def rule(self, name: str, body: str) -> str:
        """Adds a rule; its name, which may carry options in brackets, without them."""
        self._rules[name] = body
        return name.partition("[")[0]

    def json(self, name: str, schema: Any) -> str:
        """Adds a rule for JSON that fits `schema`."""
        value = schema if isinstance(schema, dict) else {} if schema is True or schema is None else {"not": {}}
        options = value.get("x-guidance")
        merged = {**value, "x-guidance": {**_SPACING, **(options if isinstance(options, dict) else {})}}
        return self.rule(name, "%json " + json.dumps(merged, ensure_ascii=False))

    def free_until(self, name: str, end: str) -> str:
        """Adds a rule for any text up to and with the first `end`."""
        special = self._special.search(end)
        if special:  # which no text holds; what stands before it in `end` is as good a part of the text
            return self.rule(name, f"/(?s:.*)/ {self.text(end[special.start() :])}")
        return self.rule(f"{name}[suffix={quoted(end)}]", "/(?s:.*)/")

    def source(self) -> str:
        """The grammar's text."""
        return "".join(f"{name}: {body}\n" for name, body in self._rules.items())


def quoted(text: str) -> str:
    """A string as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def function_of(tool: Tool) -> Mapping[str, Any]:
    """The function that a tool is: OpenAI's shape, or the function alone."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def name_of(tool: Tool) -> str:
    """The function's name."""
    return str(function_of(tool).get("name", ""))


def parameters_of(tool: Tool) -> dict[str, Any]:
    """The schema of a function's arguments: always of an object."""
    found = function_of(tool).get("parameters")
    return {"type": "object", **found} if isinstance(found, Mapping) else {"type": "object"}


def schemas_of(tools: Sequence[Tool]) -> dict[str, Any]:
    """The arguments' schemas by function."""
    return {name_of(tool): parameters_of(tool) for tool in tools}


Choice = str | Mapping[str, Any]
"""OpenAI's `tool_choice`: "required", "auto", a function's name, or {"type": "function", "function": {"name"}}."""


def chosen(tools: Sequence[Tool], choice: Choice) -> tuple[Sequence[Tool], str]:
    """The tools that may be called, and "required" or "auto". Raises ToolError if there is none of that name."""
    if tools and choice in ("required", "auto"):
        return tools, str(choice)
    name = name_of(choice) if isinstance(choice, Mapping) else choice
    found = [tool for tool in tools if name_of(tool) == name]
    if not found:
        known = ", ".join(map(name_of, tools)) or "none"
        raise ToolError(f"Tool with name {name} not found. Known: {known}", param="tool_choice")
    return found, "required"


def held_schema(tool: Tool, choice: str) -> dict[str, Any]:
    """What a function's arguments are held to: under "auto" only strict functions have a schema."""
    if choice == "auto" and not function_of(tool).get("strict"):
        return {"type": "object"}
    return parameters_of(tool)


class Frame:
    """The texts around and between calls. `opening` comes before the first, `between` between two (None: a format that
    has no parallel calls), `closing` behind the last; `trigger` is a part of `opening`, or "" where text must be told
    from calls by its first character."""

    __slots__ = ("between", "closing", "opening", "trigger")

    def __init__(self, opening: str, between: str | None, closing: str, trigger: str) -> None:
        self.opening, self.between, self.closing, self.trigger = opening, between, closing, trigger

    def grammar(self, lark: Lark, calls: Sequence[str], choice: str, parallel: bool, bare: str = "") -> tuple[str, str]:
        """(kind, source): one of `calls`, rules of `lark`, or several of them. `bare`: see ToolFormat."""
        opening = self.opening
        if choice == "auto" and self.trigger:
            opening = opening.partition(self.trigger)[2]
        call = lark.rule("call", " | ".join(calls))
        many = f"{call} ({lark.text(self.between)} {call})*" if parallel and self.between is not None else call
        body = f"{lark.text(opening)} {many} {lark.text(self.closing)}".strip()
        if choice == "auto" and not self.trigger:
            lark.rule("TEXT", f"/\\s*[^\\s{re.escape(bare)}](?s:.*)/")
            body = f"TEXT | {body}"
        lark.rule("start", body)
        return "lark", lark.source()


WriteCall = Callable[[Lark, str, Tool, str], str]
"""(grammar, a rule's name, tool, choice) -> the rule's body for one call of that tool."""


def grammar(
    frame: Frame, write: WriteCall, tools: Sequence[Tool], choice: Choice, parallel: bool,
    special_ids: Mapping[str, int] | None, bare: str = "",
) -> tuple[str, str]:  # fmt: skip
    """A format's grammar: each tool's call written by `write`, framed."""
    lark = Lark(special_ids)
    callable_tools, kind = chosen(tools, choice)
    rules = [lark.rule(f"call_{i}", write(lark, f"call_{i}", tool, kind)) for i, tool in enumerate(callable_tools)]
    return frame.grammar(lark, rules, kind, parallel, bare)
