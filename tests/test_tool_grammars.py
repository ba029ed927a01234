"""Grammars of tool calls: llguidance takes them, what models write fits them, and what is no call does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support_tools import WRITERS, Call, text_of
from tokenmill.errors import ToolError
from tokenmill.text.router import router_of
from tokenmill.text.tools import by_name

llguidance = pytest.importorskip("llguidance")

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "place": {"$ref": "#/$defs/place"},
                    "sure": {"type": "boolean"},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
                "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
WEATHER: Call = ("get_weather", {"city": "Zürich", "days": 3, "unit": "C", "place": {"x": 1.5}})
FIRM: Call = ("get_weather", {"city": "Zürich", "unit": "C", "days": 3, "place": {"x": 1.5}})
"""The same where the required come first."""
FIRM_FIRST = {"pythonic", "gemma", "functiongemma"}
FORMATS = sorted(WRITERS)


class Tokens:
    """Bytes as tokens, and the markers of a format as special ones."""

    def __init__(self, markers: tuple[str, ...]) -> None:
        self.ids = {marker: 257 + i for i, marker in enumerate(dict.fromkeys(markers))}
        self.tokens = [bytes([i]) for i in range(256)] + [b"<eos>"] + [marker.encode() for marker in self.ids]
        self.special_token_ids = [256, *self.ids.values()]
        self.eos_token_id = 256
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    def encode(self, text: str) -> list[int]:
        found: list[int] = []
        while text:
            marker = next((marker for marker in sorted(self.ids, key=len, reverse=True) if text.startswith(marker)), "")
            found += [self.ids[marker]] if marker else text[0].encode()
            text = text[len(marker) or 1 :]
        return found


def special_markers(name: str) -> tuple[str, ...]:
    return tuple(marker for marker in by_name(name).markers if marker not in ("functools", "```", "```json"))


def fits(name: str, text: str, special: bool, choice: Any = "required", parallel: bool = True) -> bool:
    """True if the whole text, and then the end, is what the grammar allows."""
    tokens = Tokens(special_markers(name) if special else ())
    wrapped = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens))
    kind, source = by_name(name).grammar(TOOLS, choice, parallel, tokens.ids)
    grammar = llguidance.grammar_from(kind, source)
    assert llguidance.LLMatcher.validate_grammar(grammar, wrapped) == "", source
    matcher = llguidance.LLMatcher(wrapped, grammar)
    ids = tokens.encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and (matcher.is_stopped() or matcher.is_accepting())


def written(name: str, calls: list[Call]) -> str:
    """As the model is made to write them: canonical where a format reads more than it writes."""
    if name == "smollm":
        return WRITERS["hermes"](calls)
    if name == "generic":
        return ", ".join(WRITERS["generic"]([call])[1:-1] for call in calls)
    if name in ("pythonic", "gemma"):
        given = [f"{called}({', '.join(f'{key}={text_of(value)}' for key, value in a.items())})" for called, a in calls]
        return f"[{', '.join(given)}]" if name == "pythonic" else "```tool_code\n" + "\n".join(given) + "\n```"
    return WRITERS[name](calls)


def weather(name: str) -> Call:
    return FIRM if name in FIRM_FIRST else WEATHER


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_model_writes_fits_and_is_read_back(name: str, special: bool) -> None:
    calls = [weather(name), ("now", {})]
    for made in ([calls[0]], [calls[1]], calls):
        if name == "harmony" and len(made) > 1:
            continue
        text = written(name, made)
        assert fits(name, text, special), text
        router = router_of("", parser=name, tools=TOOLS)
        answer = [router.push(text), router.finish()]
        pieces = [call for delta in answer for call in delta.calls]
        assert [(call.name, json.loads(call.arguments)) for call in pieces] == made


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_call_does_not_fit(name: str) -> None:
    good = weather(name)
    assert not fits(name, "Hello", True)
    assert not fits(name, "", True)
    assert not fits(name, written(name, [("other", good[1])]), True)
    assert not fits(name, written(name, [(good[0], {**good[1], "unit": "K"})]), True) or name == "functiongemma"
    assert not fits(name, written(name, [(good[0], {"unit": "C"})]), True)
    assert not fits(name, written(name, [(good[0], {**good[1], "days": "x"})]), True)


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_function_and_a_single_call_are_held_to(name: str) -> None:
    assert fits(name, written(name, [("now", {})]), True, choice="now")
    assert fits(name, written(name, [("now", {})]), True, choice={"type": "function", "function": {"name": "now"}})
    assert not fits(name, written(name, [weather(name)]), True, choice="now")
    assert not fits(name, written(name, [("now", {}), ("now", {})]), True, parallel=False)


@pytest.mark.parametrize("name", FORMATS)
def test_under_auto_strict_arguments_are_held_to_behind_the_trigger(name: str) -> None:
    form = by_name(name)
    text = written(name, [weather(name)])
    if not form.trigger:
        assert fits(name, "Hello, {world} [1]", True, choice="auto")
        assert fits(name, text, True, choice="auto")
    else:
        assert form.trigger in text
        text = text.partition(form.trigger)[2]
        assert fits(name, text, True, choice="auto"), text
    bad = written(name, [(weather(name)[0], {**weather(name)[1], "days": "x"})])
    assert not fits(name, bad.partition(form.trigger)[2] if form.trigger else bad, True, choice="auto")


def test_spaces_have_an_end() -> None:
    text = written("hermes", [WEATHER])
    assert fits("hermes", text.replace('"city"', "  " * 4 + '"city"'), True)
    assert not fits("hermes", text.replace('"city"', " " * 100 + '"city"'), True)


def test_what_tags_cannot_hold_a_text_to_is_refused_for_strict_functions_only() -> None:
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string", "pattern": "^x$"}}}}
    by_name("qwen3_coder").grammar([{"type": "function", "function": tool}], "required", True)
    with pytest.raises(ToolError, match=r"properties\.a\.pattern"):
        by_name("qwen3_coder").grammar([{"type": "function", "function": {**tool, "strict": True}}], "required", True)
