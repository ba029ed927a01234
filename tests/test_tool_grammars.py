"""Grammars of tool calls: llguidance compiles them; they accept calls as models write them, and nothing else."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import pytest

from tests.support_slow import mostly_slow
from tests.support_tools import BARE, UNLIKE, WRITERS, Call, marks_of, router_of, text_of
from tests.support_walks import Tokens, compiled, special_markers
from tokenmill.errors import ToolError
from tokenmill.text.machine import Held
from tokenmill.text.router import fold
from tokenmill.text.tools import by_name
from tokenmill.text.tools.base import Extent, GrammarRequest

EXAMPLES = int(os.environ.get("EXAMPLES", "12"))
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
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
                "$defs": {
                    "place": {
                        "type": "object",
                        "properties": {"x": {"type": "number"}},
                        "required": ["x"],
                        "additionalProperties": False,
                    }
                },
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    },
    {"type": "function", "function": {"name": "note"}},
]
WEATHER: Call = ("get_weather", {"city": "Zürich", "days": 3, "unit": "C", "place": {"x": 1.5}})
FIRM: Call = ("get_weather", {"city": "Zürich", "unit": "C", "days": 3, "place": {"x": 1.5}})
"""The same where the required come first."""
NOTE: Call = ("note", {"text": "a b", "tags": ["x", 1], "deep": {"k": None}})
FIRM_FIRST = {"pythonic", "gemma", "functiongemma", "lfm2"}
FORMATS = sorted(WRITERS)


def fits(
    name: str, text: str, special: bool, extent: Extent = "calls", *, parallel: bool = True, tools: Any = None,
    instead: str = "",
) -> bool:  # fmt: skip
    """Return True if the grammar allows the whole text followed by the end."""
    tokens = Tokens(special_markers(name) if special else ())
    asked = GrammarRequest(tools or TOOLS, extent, parallel, tokens.ids, instead=instead)
    matcher = compiled(by_name(name).grammar(asked), tokens).matcher()
    return all(matcher.accept(i) for i in (*tokens.encode(text), tokens.end))


def written(name: str, calls: list[Call]) -> str:
    """Return calls as the grammar makes a model write them: canonical, even if the parser reads more spellings."""
    if name == "smollm":
        return WRITERS["hermes"](calls)
    if name == "generic":
        return ", ".join(WRITERS["generic"]([call])[1:-1] for call in calls)
    if name in ("pythonic", "gemma", "lfm2"):
        given = [f"{called}({', '.join(f'{key}={text_of(value)}' for key, value in a.items())})" for called, a in calls]
        given = [call.replace("null", "None") for call in given]
        begin, between, end = {
            "pythonic": ("[", ", ", "]"),
            "gemma": ("```tool_code\n", "\n", "\n```"),
            "lfm2": ("<|tool_call_start|>[", ", ", "]<|tool_call_end|>"),
        }[name]
        return begin + between.join(given) + end
    return WRITERS[name](calls)


def weather(name: str) -> Call:
    return FIRM if name in FIRM_FIRST else WEATHER


def wrong(name: str) -> list[Call]:
    """Return calls of a strict function that do not fit its schema."""
    called, given = weather(name)
    changes: list[dict[str, Any]] = [{"days": "x"}, {"days": 15}, {"unit": "K"}, {"more": 1}, {"place": {"y": 1}}]
    return [(called, {"unit": "C"}), *((called, {**given, **change}) for change in changes)]


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


@pytest.mark.parametrize(("extent", "special"), [("calls", False), ("answer", True)])
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_grammar_allows_is_read_back_whatever_marks_are_in_it(name: str, extent: Held, special: bool) -> None:
    draw, num_read = random.Random(name), 0
    tokens = Tokens(special_markers(name) if special or name == "harmony" else ())
    assert extent
    grammar = compiled(by_name(name).grammar(GrammarRequest(TOOLS, extent, True, tokens.ids)), tokens)
    marks = [mark for mark in (*marks_of(name), ">", "</") if mark != "null"]  # `written` makes that None
    for _ in range(EXAMPLES):
        city, tag = ("x" + "".join(draw.choices(marks, k=draw.randint(0, 5))) for _ in range(2))
        weather: Call = ("get_weather", {"city": city, "unit": "C", "tags": [tag, city]})
        made = draw.choice([[weather], [("note", {"text": tag}), weather], [weather, ("now", {})]])
        made = made[:1] if name == "harmony" else made
        text, matcher = written(name, made), grammar.matcher()
        if not all(matcher.accept(i) for i in (*tokens.encode(text), tokens.end)):
            continue
        num_read += 1
        for pieces in ([text], list(text)):
            router = router_of("", parser=name, tools=TOOLS, held=extent)
            answer = fold([*map(router.push, pieces), router.finish()])
            assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == made, text
            assert answer.content == ""
    assert num_read > EXAMPLES / 20


@pytest.mark.parametrize("name", mostly_slow(FORMATS, UNLIKE))
def test_what_is_no_call_does_not_fit(name: str) -> None:
    assert not fits(name, "Hello", True)
    assert not fits(name, "", True)
    assert not fits(name, written(name, [("other", weather(name)[1])]), True)
    assert not fits(name, written(name, [("now", {"x": 1})]), True)
    for call in wrong(name):
        assert not fits(name, written(name, [call]), True), call


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_function_and_a_single_call_are_held_to(name: str) -> None:
    assert fits(name, written(name, [("now", {})]), True, tools=TOOLS[1:2])
    assert not fits(name, written(name, [weather(name)]), True, tools=TOOLS[1:2])
    assert not fits(name, written(name, [("now", {}), ("now", {})]), True, parallel=False)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", mostly_slow(FORMATS, UNLIKE))
def test_in_an_answer_there_is_text_and_strict_calls_are_held_to(name: str, special: bool) -> None:
    if name == "harmony" and not special:
        return

    def allowed(before: str, calls: list[Call], behind: str = "") -> bool:
        text = f"{before}{written(name, calls)}{behind}" if calls else before + behind
        return fits(name, said(name, text, bool(calls)), special, "answer")

    prose = "I'll look: 1 < 2, <b>x</b>, ```py\nf(x)[0]\n``` and [y](z).\n\n"
    for text in ("", "Hello", prose, "<tool", "[", "x {", '"name": "get_weather"', "`", "\n\n"):
        assert allowed(text, []), text
    before = "" if name in BARE else prose
    good, behind = weather(name), "" if name == "harmony" else "\nDone."
    for calls in ([good], [NOTE], [good, NOTE], [NOTE, good, ("now", {})]):
        if name != "harmony" or len(calls) == 1:
            assert allowed(before, calls, behind), calls
            assert name == "harmony" or name in BARE or allowed(before, calls, behind + written(name, calls)), calls
    for call in wrong(name):
        assert not allowed(before, [call]), call
        assert not allowed(before, [NOTE, call]), call
        if name not in BARE and name != "harmony":
            assert not allowed(f"{before}{written(name, [good])} and ", [call]), call
    if name != "harmony":
        form = by_name(name)
        behind_trigger = written(name, [good]).partition(form.trigger)[2] if form.trigger else ""
        assert not form.trigger or fits(name, behind_trigger + " Done.", special, "behind")


def said(name: str, text: str, called: bool) -> str:
    """Return an answer as the format writes it."""
    return text if name != "harmony" or (called and text.startswith("<|")) else harmony(text)


def harmony(text: str) -> str:
    before, found, call = text.partition("<|channel|>commentary to")
    thought = "<|channel|>analysis<|message|>Well: to=functions.now<|end|><|start|>assistant"
    if not found:
        return f"{thought}<|channel|>final<|message|>{before}"
    return f"{thought}<|channel|>commentary<|message|>{before}<|end|><|start|>assistant{found}{call}"


def test_a_call_may_be_addressed_before_its_channel() -> None:
    for city, good in (('"Oslo"', True), ("1", False)):
        arguments = f'{{"city": {city}, "unit": "C"}}'
        text = f" to=functions.get_weather<|channel|>commentary json<|message|>{arguments}<|call|>"
        assert fits("harmony", text, True, "answer") == good
    assert not fits("harmony", "<|channel|>commentary to=get_weather json<|message|>{}<|call|>", True, "answer")
    with pytest.raises(ToolError, match="is no token"):
        fits("harmony", "", False, "answer")


@pytest.mark.parametrize("name", ["llama", "generic"])
def test_a_bare_answer_may_be_json_that_is_no_call(name: str) -> None:
    for text in ('{"name": "Ada", "parameters": {}}', '[{"a": [1, "get_weather"]}]', '{"name": "now_", "x": 1}', "{",
                 '{"parameters": {"days": "x"}, "name": "get_weather"}', "[1]"):  # fmt: skip
        assert fits(name, text, True, "answer"), text
        router = router_of("", parser=name, tools=TOOLS, held="answer")
        assert router.push(text).calls == router.finish().calls == (), text
    assert not fits(name, '{"name": "get_weather"', True, "answer")
    good = '"parameters" :\n{"city": "Oslo", "unit": "C"}}'
    for begin in (
        '{"name":"get_weather",',
        ' { "type": "function", "name" : "get_weather" , ',
        '[ {"name": "get_weather",',
    ):
        text = begin + good + ("]" if "[" in begin else "")
        assert fits(name, text, True, "answer"), text
        assert not fits(name, text.replace('"C"', '"K"'), True, "answer"), text


def test_a_block_of_json_may_hold_anything_but_a_wrong_call() -> None:
    call = '{"name": "get_weather", "arguments": {"city": "Oslo", "unit": "C"}}'
    for text in (f"So:\n```json\n{call}\n```\n", 'So:\n```json\n{"name": "Ada"}\n```\n', "```json"):
        assert fits("generic", text, True, "answer"), text
    assert not fits("generic", f"```json\n{call.replace('C', 'K')}\n```", True, "answer")


@pytest.mark.parametrize("name", mostly_slow(FORMATS, UNLIKE))
def test_an_answer_may_be_held_to_a_shape_instead(name: str) -> None:
    shape = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    rules = f"instead: %json {json.dumps(shape)}\n"
    answer = '{"a": 1}'
    final = f"<|channel|>final<|message|>{answer}" if name == "harmony" else answer
    assert fits(name, final, True, "choice", instead=rules)
    assert not fits(name, final.replace("1", '"1"'), True, "choice", instead=rules)
    assert not fits(name, said(name, "Hello", False), True, "choice", instead=rules)
    text = written(name, [weather(name)])
    assert fits(name, text, True, "choice", instead=rules)
    for call in wrong(name):
        assert not fits(name, written(name, [call]), True, "choice", instead=rules)


def test_spaces_have_an_end() -> None:
    text = written("hermes", [WEATHER])
    assert fits("hermes", text.replace('"city"', "  " * 4 + '"city"'), True)
    assert not fits("hermes", text.replace('"city"', " " * 100 + '"city"'), True)


@pytest.mark.parametrize("name", ["qwen3_coder", "glm", "minimax", "functiongemma"])
@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "string", "pattern": "^x$"}, "pattern"),
        ({"anyOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "maxLength"),
        ({"$ref": "#/$defs/text"}, "minLength"),
    ],
)
def test_what_tags_cannot_hold_a_text_to_is_refused_for_strict_functions_only(
    name: str, schema: dict[str, Any], keyword: str
) -> None:
    defs = {"text": {"type": "string", "minLength": 2}}
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}, "$defs": defs}}
    fits(name, "", True, tools=[{"type": "function", "function": tool}])
    with pytest.raises(ToolError, match=rf"properties\.a\.{keyword}"):
        fits(name, "", True, tools=[{"type": "function", "function": {**tool, "strict": True}}])


def test_listed_texts_may_stand_elsewhere_in_the_schema() -> None:
    parameters = {
        "type": "object", "properties": {"unit": {"$ref": "#/$defs/Unit", "description": "of heat"}},
        "required": ["unit"], "$defs": {"Unit": {"type": "string", "enum": ["C", "F"]}}, "additionalProperties": False,
    }  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}]
    for name in FORMATS:
        assert fits(name, written(name, [("f", {"unit": "F"})]), True, tools=tools), name
        assert not fits(name, written(name, [("f", {"unit": "K"})]), True, tools=tools), name


def test_a_schema_that_holds_itself_is_served() -> None:
    parameters = {
        "type": "object", "properties": {"size": {"type": "integer"}, "inner": {"$ref": "#"}}, "required": ["size"],
        "additionalProperties": False,
    }  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}]
    rules = 'instead: %json {"type": "object", "properties": {"a": {}}, "required": ["a"]}\n'
    for name in set(FORMATS) - {"functiongemma"}:
        for extent in ("calls", "choice"):
            good, bad = (written(name, [("f", {"size": 1, "inner": {"size": 2, "inner": {"size": size}}})])
                         for size in (3, "x"))  # fmt: skip
            assert fits(name, good, True, extent, tools=tools, instead=rules), name
            assert not fits(name, bad, True, extent, tools=tools, instead=rules), name
