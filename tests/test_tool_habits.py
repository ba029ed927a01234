"""Frequent deviations of models from their call format, which are read as intended."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.support_tools import WRITERS, Call
from tests.test_tools import read, reader
from tokenmill.text.tools import by_name

OSLO = {"city": "Oslo", "days": 3}
AROUND = {  # JSON arguments in each format
    "hermes": '<tool_call>\n{{"name": "get_weather", "arguments": {}}}\n</tool_call>',
    "smollm": '<tool_call>[{{"name": "get_weather", "arguments": {}}}]</tool_call>',
    "llama": '{{"name": "get_weather", "parameters": {}}}',
    "generic": '```json\n{{"name": "get_weather", "arguments": {}}}\n```',
    "mistral": '[TOOL_CALLS][{{"name": "get_weather", "arguments": {}}}]',
    "mistral_args": "[TOOL_CALLS]get_weather[ARGS]{}[TOOL_CALLS]now[ARGS]{{}}",
    "deepseek": "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{}\n```<｜tool▁call▁end｜>",
    "deepseek_v31": "<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
    "kimi": "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
    "phi4": '<|tool_call|>[{{"name": "get_weather", "arguments": {}}}]<|/tool_call|>',
    "nemotron": '<TOOLCALL>[{{"name": "get_weather", "parameters": {}}}]</TOOLCALL>',
    "granite": '<|tool_call|>[{{"arguments": {}, "name": "get_weather"}}]',
    "command_r": '<|START_ACTION|>[{{"tool_name": "get_weather", "parameters": {}}}]<|END_ACTION|>',
    "harmony": "<|channel|>commentary to=functions.get_weather json<|message|>{}<|call|>",
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('""', {}), ("null", {}), ("None", {}), ("[]", {}), ('"null"', {}), ("{ }", {}),
        ("{'city': 'it\\'s', \"days\": 3}", {"city": "it's", "days": 3}),
        ("{'city': 'it's \"}\" here', 'days': 3,}", {"city": 'it\'s "}" here', "days": 3}),
        ('{"sure": True, "unit": None, "more": {"a": False}}', {"sure": True, "unit": None, "more": {"a": False}}),
        ('{"tags": ["a", "b",], }', {"tags": ["a", "b"]}),
        ('{"city": "don\\\'t"}', {"city": "don't"}),
        ('{"city": "Oslo", "days": 3}}', OSLO), ('{"city": "Oslo", "days": 3}\n}\n}', OSLO),
        (json.dumps(json.dumps(OSLO)), OSLO), (json.dumps(json.dumps(json.dumps(OSLO))), OSLO),
        (json.dumps("{'city': 'Oslo', 'days': 3,}"), OSLO),
        ('{"city": "True", "tags": ["None", "1,]"]}', {"city": "True", "tags": ["None", "1,]"]}),
    ],
)  # fmt: skip
def test_arguments_are_read_as_they_were_meant(name: str, written: str, meant: dict[str, Any]) -> None:
    if name == "granite" and re.search(r"3\}\s*\}", written):  # the name follows: a brace too many is not at the end
        return
    whole = AROUND[name].format(written)
    for pieces in ([whole], list(whole)):
        _, answer = read(reader(name), pieces)
        first, *others = [(call.name, json.loads(call.arguments)) for call in answer.calls]
        assert first == ("get_weather", meant)
        assert others == ([("now", {})] if name == "mistral_args" else [])
        assert answer.content == ""


@pytest.mark.parametrize("name", sorted(AROUND.keys() - {"granite"}))
def test_brackets_that_are_missing_are_closed_by_an_outer_one_or_a_mark(name: str) -> None:
    for written, meant in (
        ('{"city": "x", "more": {"a": 1}', {"city": "x", "more": {"a": 1}}),
        ('{"tags": ["a", "}]"}', {"tags": ["a", "}]"]}),
        ('{"more": {"a": [{"b": 1]}}', {"more": {"a": [{"b": 1}]}}),
        ('{"more": {"a": [{"b": "}]"}]', {"more": {"a": [{"b": "}]"}]}}),
    ):
        whole = AROUND[name].format(written)
        if name == "llama" and written[-1] == "]":  # not distinguishable from a truncated answer
            continue
        for pieces in ([whole], list(whole)):
            _, answer = read(reader(name), pieces)
            assert json.loads(answer.calls[0].arguments) == meant, whole
            assert answer.content == ""


def test_several_calls_may_stand_between_the_marks() -> None:
    first, second = ('{"name": "get_weather", "arguments": {"city": "Oslo"}}', '{"name": "now", "arguments": {}}')
    for name, begin, end in (
        ("hermes", "<tool_call>", "</tool_call>"), ("nemotron", "<TOOLCALL>", "</TOOLCALL>"), ("generic", "", ""),
        ("granite", "<|tool_call|>", ""), ("mistral", "[TOOL_CALLS]", ""), ("llama", "", ""),
    ):  # fmt: skip
        for between in ("", "\n", ",", ", ", "}", "\n\n"):
            for opened, closed in (("", ""), ("[", "]"), ("[", ",]"), ("[", "]]")):
                whole = begin + opened + first + between + second + closed + end
                for pieces in ([whole], list(whole)):
                    _, answer = read(reader(name), pieces)
                    calls = [(call.name, json.loads(call.arguments)) for call in answer.calls]
                    assert calls == [("get_weather", {"city": "Oslo"}), ("now", {})], whole
                    assert answer.content == "", whole


def test_text_around_calls_is_content_once_and_behind_them_to_the_byte() -> None:
    call = '{"name": "now", "arguments": {}}'
    for begin, end in (("<tool_call>", "</tool_call>"), ("<tool_call>[", "]</tool_call>")):
        for tail in ("}", " } and", ", then", "[1]", '{"x": 1}', "]"):
            whole = f"a {begin}{call}{end} b {begin}{call}{end}{tail}"
            for pieces in ([whole], list(whole)):
                _, answer = read(reader("hermes"), pieces)
                assert ([one.name for one in answer.calls], answer.content) == (["now", "now"], f"a b{tail}")
    for name, whole in (
        ("pythonic", "[now()]]"), ("lfm2", "<|tool_call_start|>[now()])]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[now()"),
        ("mistral", f"[TOOL_CALLS] [{call}] [/TOOL_CALLS]"), ("mistral_args", "[TOOL_CALLS]now[ARGS]{}[/TOOL"),
    ):  # fmt: skip
        for pieces in ([whole], list(whole)):
            _, answer = read(reader(name), pieces)
            assert ([one.name for one in answer.calls], answer.content) == (["now"], ""), whole
    for tail, content in (("; then", "; then"), ('\n\n{"x": 1}', '\n\n{"x": 1}'), ("}", ""), ("\n", "")):
        _, answer = read(reader("llama"), [call.replace("arguments", "parameters") + tail])
        assert ([one.name for one in answer.calls], answer.content) == (["now"], content)


TAGS = ["qwen3_coder", "seed_oss", "minimax", "glm"]


@pytest.mark.parametrize("name", TAGS)
def test_a_closing_tag_that_is_missing_swallows_nothing(name: str) -> None:
    made: list[Call] = [("get_weather", OSLO), ("now", {})]
    whole, style = WRITERS[name](made), by_name(name).style  # type: ignore[attr-defined]
    for close in (f"\n{style.value_end}", style.value_end):
        if close in whole:
            break
    first, second = whole.replace(close, "", 1), "".join(whole.rsplit(close, 1))
    for text in (first, second, whole.replace(close, ""), whole.replace(close, "").replace("\n", "")):
        for pieces in ([text], list(text)):
            _, answer = read(reader(name), pieces)
            assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == made, text
            assert answer.content == ""
    unknown = first.replace("days", "else")  # not a parameter of the function: its tag is text
    _, answer = read(reader(name), [unknown])
    ((key, value),) = json.loads(answer.calls[0].arguments).items()
    assert (key, value[:4], "else" in value) == ("city", "Oslo", True)


@pytest.mark.parametrize("name", TAGS)
def test_a_closing_tag_with_a_tag_behind_it_is_one(name: str) -> None:
    """This is the rule for values that look like their surroundings."""
    style = by_name(name).style  # type: ignore[attr-defined]
    value = f"a{style.value_end}\n{style.key}days{style.key_end}{style.value}1"
    _, answer = read(reader(name), [WRITERS[name]([("get_weather", {"city": value})])])
    assert json.loads(answer.calls[0].arguments) == {"city": "a", "days": 1}


@pytest.mark.parametrize("name", ["functiongemma", "pythonic", "gemma", "lfm2"])
def test_a_quote_without_a_separator_behind_it_is_a_part_of_the_text(name: str) -> None:
    quote = "<escape>" if name == "functiongemma" else "'"
    for city in (f"a{quote}b", f"{quote}a{quote} b{quote}{quote}c", f"it{quote}s", f"x {quote} y"):
        for tags in ([], [f"p{quote}q", "r"]):
            whole = WRITERS[name]([("get_weather", {"city": "CITY", "tags": ["TAG" for _ in tags]}), ("now", {})])
            whole = whole.replace("CITY", city)
            for tag in tags:
                whole = whole.replace("TAG", tag, 1)
            for pieces in ([whole], list(whole)):
                _, answer = read(reader(name), pieces)
                calls = [(call.name, json.loads(call.arguments)) for call in answer.calls]
                assert calls == [("get_weather", {"city": city, "tags": tags}), ("now", {})], whole
    _, answer = read(reader("pythonic"), ['[get_weather(city="""say "hi", he said""", tags=["""a""", ""])]'])
    assert json.loads(answer.calls[0].arguments) == {"city": 'say "hi", he said', "tags": ["a", ""]}


@pytest.mark.parametrize("name", [*TAGS, "functiongemma", "hermes", "pythonic"])
def test_a_text_stays_one_if_its_schema_says_so(name: str) -> None:
    for value in ("12", "1.50", "true", "null", "None", '{"a": 1}', "[1]", '"x"', "", " 1 ", "\n1\n"):
        made: list[Call] = [("get_weather", {"city": value})]
        _, answer = read(reader(name), [WRITERS[name](made)])
        assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == made


@pytest.mark.parametrize(
    "body", ['{"name": "get_weather", "city": "Oslo"}', f'{{"name": "now", "arguments": {{"a": {"1" * 2000}}}}}']
)
def test_arguments_that_have_no_key_or_no_end_are_content(body: str) -> None:
    """A call without them would be a different call."""
    whole = f"<tool_call>{body}</tool_call>"
    for pieces in ([whole], list(whole)):
        _, answer = read(reader("hermes"), pieces)
        assert (answer.content, answer.calls) == (whole, ())
