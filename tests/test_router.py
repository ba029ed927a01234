"""The router: reasoning first, then calls, then content; and the formats of real templates."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.support_tools import BARE, WRITERS, Call, cut, router_of
from tests.test_tools import TOOLS, reader
from tokenmill.text.reasoning import reasoning_of
from tokenmill.text.router import CallDelta, Delta, Router, fold
from tokenmill.text.tools import formats, of_template

THINK = '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call> {{ \'</think>\' }}'
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'

EXCERPTS = {
    "hermes": "return a json object with function name and arguments within <tool_call></tool_call> XML tags:\\n"
    '<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n',
    "qwen3_coder": "{{- '\\n<tool_call>\\n<function=' + name + '>\\n' }}{{- '<parameter=' + args_name + '>\\n' }}",
    "glm": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>",
    "llama": 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{{- '<|python_tag|>' + tool_call.name }}",
    "pythonic": "Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)] {{ '<|python_tag|>' }}",
    "mistral": '{{- "[TOOL_CALLS][" }}{%- set out = tool_call.function|tojson %}{{- \', "id": "\' + tool_call.id }}',
    "mistral_args": "{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}",
    "deepseek": "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + type + '<｜tool▁sep｜>' + name + '\\n```json'}}",
    "deepseek_v31": "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ name + '<｜tool▁sep｜>' + arguments}}",
    "kimi": "<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>",
    "phi4": "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' }}",
    "granite": "When a tool is required, respond only with <|tool_call|> followed by a JSON list of tools used.",
    "command_r": "<|START_ACTION|>[\n{\"tool_call_id\": \"{{ i }}\", \"tool_name\": \"{{ tc['function']['name'] }}\"}]",
    "harmony": '"<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>"',
    "functiongemma": "{{ '<start_function_call>call:' + name + '{' }}",
    "gemma": "call functions in a ```tool_code block",
    "smollm": "{%- if xml_tools or python_tools -%}### Tools … <tool_call>\n{\"name\": <function-name>}</tool_call>",
    "seed_oss": "{%- set begin = '<seed:tool_call>' -%} {{ begin + '<function=' + name + '>' }}<parameter=a>",
    "minimax": "{%- set begin = '<minimax:tool_call>' %} <invoke name=\"tool-name-1\">",
    "nemotron": "Use <TOOLCALL>[{\"name\": …}]</TOOLCALL>",
    "lfm2": "{{ '<|tool_call_start|>' }}[a(b=1)]{{ '<|tool_call_end|>' }}",
    "generic": "{% for message in messages %}{{ message.content }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_template_tells_its_format(name: str) -> None:
    assert of_template(EXCERPTS[name]).name == name
    matching = [form.name for form in formats() if form.matches(EXCERPTS[name])]
    assert matching == ([] if name == "generic" else [name])


def test_thought_content_and_call_come_apart_wherever_the_text_is_cut() -> None:
    whole = f"<think>\nWhere? <tool_call>\n</think>\n\nI look.\n{CALL}\n"
    expected = Delta("Where? <tool_call>", "I look.", (CallDelta(0, '{"city": "Oslo"}', "id0", "get_weather"),))
    for places in ([], range(len(whole)), *([place] for place in range(len(whole)))):
        router = router_of(THINK, tools=TOOLS, reasoning=reasoning_of(THINK, "assistant\n"), new_id=lambda: "id0")
        deltas = [router.push(piece) for piece in cut(whole, list(places))]
        assert fold([*deltas, router.finish()]) == expected
        assert router.complete_calls == 1


def test_a_call_is_not_searched_for_without_tools() -> None:
    router = router_of(THINK)
    assert fold([router.push(CALL), router.finish()]) == Delta(content=CALL)
    router = router_of(THINK, reasoning=reasoning_of(THINK, "<think>\n"))
    assert fold([router.push(CALL), router.finish()]) == Delta(reasoning=CALL)


def thinking(name: str, **more: Any) -> Router:
    """Return the router of an answer that begins inside <think> tags, with calls of that format."""
    return router_of(
        "", parser=name, tools=TOOLS, reasoning=reasoning_of(THINK, "<think>\n"), new_id=lambda: "id0", **more
    )


ASIDE = "Let me look. [1] {a} <tool_call> or [TOOL_CALLS]?\n\n"
OSLO: Call = ("get_weather", {"city": "Oslo"})


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"harmony"}))
def test_a_call_ends_the_thought_that_it_begins_in(name: str) -> None:
    for calls in ([OSLO], [OSLO, ("now", {})]):
        whole = ASIDE + WRITERS[name](calls)
        for pieces in ([whole], list(whole), *(cut(whole, [place]) for place in range(0, len(whole), 3))):
            router = thinking(name)
            answer = fold([*map(router.push, pieces), router.finish()])
            assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == calls
            assert (answer.reasoning, answer.content) == (ASIDE.strip(), "")
            assert router.complete_calls == len(calls)


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"harmony"}))
@pytest.mark.parametrize("call", [("unheard_of", {"city": "Oslo"}), OSLO])
def test_what_is_no_call_of_a_given_function_stays_in_the_thought(name: str, call: Call) -> None:
    text = WRITERS[name]([call])
    text = text if call[0] == "unheard_of" else text[: text.index("get_weather")] + "?"
    whole = f"Is it\n{text}\nor not?\n</think>\n\nNo."
    for pieces in ([whole], list(whole)):
        router = thinking(name)
        answer = fold([*map(router.push, pieces), router.finish()])
        assert answer == Delta(f"Is it\n{text}\nor not?", "No.")


@pytest.mark.parametrize("name", sorted(BARE))
def test_a_call_without_a_mark_ends_no_thought_that_goes_on(name: str) -> None:
    whole = f"I could write\n{WRITERS[name]([OSLO])}\nbut I will not.\n</think>\n\nNo."
    for pieces in ([whole], list(whole)):
        router = thinking(name)
        answer = fold([*map(router.push, pieces), router.finish()])
        assert answer == Delta(whole.partition("\n</think>")[0], "No.")


@pytest.mark.parametrize("name", sorted(WRITERS.keys() - {"harmony"}))
def test_a_thought_may_be_nothing_but_a_call(name: str) -> None:
    whole = WRITERS[name]([OSLO])
    for pieces in ([whole], list(whole), ["\n", whole]):
        router = thinking(name)
        answer = fold([*map(router.push, pieces), router.finish()])
        assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [OSLO]
        assert (answer.reasoning, answer.content) == ("", "")


def test_the_mark_that_would_have_ended_a_thought_is_no_content() -> None:
    for behind, content in (("</think>\n\nDone.", "Done."), ("\n</think>", ""), ("Done. </think>", "Done. </think>")):
        for pieces in ([f"Hm\n{CALL}{behind}"], list(f"Hm\n{CALL}{behind}")):
            router = thinking("hermes")
            answer = fold([*map(router.push, pieces), router.finish()])
            assert (answer.reasoning, answer.content, len(answer.calls)) == ("Hm", content, 1), behind


def test_a_call_that_is_cut_off_in_an_open_thought_is_content() -> None:
    begun = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Os'
    for pieces in ([f"Hm\n{begun}"], list(f"Hm\n{begun}")):
        router = thinking("hermes")
        assert fold([*map(router.push, pieces), router.finish()]) == Delta("Hm", begun)
        assert router.complete_calls == 0


def test_tokens_of_a_call_in_an_open_thought_are_none_of_the_thought() -> None:
    router = thinking("hermes")
    told = [(router.push(character), router.in_reasoning)[1] for character in f"Hm {CALL}"]
    assert told == [True, True, *[True] * len(" <tool_call"), *[False] * (len(CALL) - len("<tool_call"))]


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_without_parallel_calls_an_answer_is_over_with_the_first(name: str) -> None:
    first = WRITERS[name]([OSLO])
    for whole in (WRITERS[name]([OSLO, ("now", {})]), f"{first}\nDone: {WRITERS[name]([('now', {})])}"):
        for pieces in ([whole], list(whole)):
            router = reader(name, parallel=False)
            deltas, size = [], 0
            for piece in pieces:
                deltas.append(router.push(piece))
                size += len(piece)
                if router.over:
                    break
            answer = fold([*deltas, router.finish()])
            assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [OSLO]
            assert (answer.content, router.over, router.complete_calls) == ("", True, 1)
            assert size <= (len(first) if len(pieces) > 1 else len(whole))
    router = reader(name)
    router.push(first)
    assert not router.over


def test_text_before_a_last_call_is_content_and_without_tools_nothing_is_ever_over() -> None:
    router = reader("hermes", parallel=False)
    assert fold([router.push(f"I look.\n{CALL}\n<tool_call>"), router.finish()]).content == "I look."
    router = router_of(EXCERPTS["harmony"], parallel=False, reasoning=reasoning_of(EXCERPTS["harmony"], ""))
    assert fold([router.push("<|channel|>final<|message|>Hi"), router.finish()]).content == "Hi"
    assert not router.over


STOPS = ["\n\n", "STOP"]
FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("template", "whole", "thought", "answer"),
    [
        (THINK, "One.\n\nSTOP, two.\n</think>\n\nYes STOP no", "One.\n\nSTOP, two.", "Yes "),
        (EXCERPTS["harmony"], "<|channel|>analysis<|message|>One.\n\nSTOP<|end|><|start|>assistant"
         "<|channel|>final<|message|>Yes STOP no<|return|>", "One.\n\nSTOP", "Yes "),
        ("<|START_THINKING|> <|END_THINKING|> <|START_RESPONSE|> <|END_RESPONSE|>",
         "<|START_THINKING|>One.\n\nSTOP<|END_THINKING|>\n\n<|START_RESPONSE|>Yes STOP no<|END_RESPONSE|>",
         "One.\n\nSTOP", "Yes "),
    ],
)  # fmt: skip
def test_stop_strings_end_the_answer_and_not_the_thought(
    template: str, whole: str, thought: str, answer: str, include: bool
) -> None:
    for pieces in ([whole], list(whole), *(cut(whole, [place]) for place in range(len(whole)))):
        router = router_of(template, reasoning=reasoning_of(template, "<think>"))
        router.end_at(STOPS, include=include)
        deltas = [router.push(piece) for piece in pieces]
        assert fold([*deltas, router.finish()]) == Delta(thought, answer + "STOP" * include)
        assert (router.stopped, router.over) == ("STOP", True)


def test_a_stop_string_that_never_comes_holds_nothing_back_in_the_end() -> None:
    for template, before in ((THINK, "STO</think>"), (EXCERPTS["harmony"], "<|channel|>final<|message|>")):
        router = router_of(template, reasoning=reasoning_of(template, "<think>"))
        router.end_at(STOPS)
        answer = fold([router.push(f"{before}Yes STO"), router.finish()])
        assert (answer.content, router.stopped) == ("Yes STO", None)


def test_a_token_that_is_not_shown_completes_a_stop_string_of_the_answer_alone() -> None:
    for template, thought, behind in (
        (THINK, "Hm", "</think>"), (EXCERPTS["harmony"], "<|channel|>analysis<|message|>Hm", "<|end|>" + FINAL)
    ):  # fmt: skip
        router = router_of(template, reasoning=reasoning_of(template, "<think>"))
        router.end_at(["<|user|>"])
        deltas = [router.push(thought), router.push("", "<|user|>"), router.push(behind), router.push("Yes")]
        assert router.stopped is None
        deltas += [router.push("", "<|user|>"), router.push("no")]
        assert fold([*deltas, router.finish()]) == Delta("Hm", "Yes")
        assert router.stopped == "<|user|>"


def test_the_least_number_of_tokens_before_a_stop_string_is_the_answers() -> None:
    for template, thought in ((THINK, list("a b STOP c</think>")), ("", [])):
        for least, text in ((0, "1"), (2, "1"), (3, "1STOP2"), (6, "1STOP2STOP3")):
            reasoning = reasoning_of(template, "<think>") if template else None
            router = router_of(template, tools=TOOLS, reasoning=reasoning, parser="hermes")
            router.end_at(["STOP"], min_tokens=least)
            deltas = [router.push(piece) for piece in (*thought, "1", "ST", "OP", "2", "STO", "P", "3")]
            assert fold([*deltas, router.finish()]).content == text, (template, least)


def test_name_and_id_come_first_and_once() -> None:
    router = reader("hermes")
    deltas = [router.push(character) for character in CALL]
    calls = [call for delta in deltas for call in delta.calls]
    assert calls[0] == CallDelta(0, "{", "id0", "get_weather")
    assert {(call.id, call.name) for call in calls[1:]} == {(None, None)}
    assert router.finish() == Delta()


@pytest.mark.parametrize(
    ("broken", "behind"), [('{"a": tru]}', " tru]}"), ('{"a": "b', ""), ('{"a": [1, {"b": 2}', "")]
)
def test_a_call_that_breaks_or_is_cut_off_is_content_once(broken: str, behind: str) -> None:
    """A client that got its beginning does not get it again."""
    text = f'Hm. <tool_call>\n{{"name": "now", "arguments": {broken}'
    for pieces in ([text], list(text), [text[:60], text[60:]]):
        router = reader("hermes")
        deltas = [*map(router.push, pieces), router.finish()]
        assert fold(deltas) == Delta(content=text)
        assert router.complete_calls == 0
        if len(pieces) > 2:
            told = [call for delta in deltas for call in delta.calls]
            assert [call.name for call in told if call.name] == ["now"]
            assert broken.startswith("".join(call.arguments for call in told))
            assert "".join(delta.content for delta in deltas) == f"Hm.{behind}"


def test_behind_a_broken_call_reading_goes_on() -> None:
    good = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    for broken in (
        '<tool_call>{"name": "now", "arguments": {"a": tru]}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": "x}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": "x", b}}</tool_call>',
        "<tool_call>now</tool_call>",
    ):
        text = f"{broken}\n{good} So."
        for pieces in ([text], list(text)):
            answer = fold([*map((router := reader("hermes")).push, pieces), router.finish()])
            assert answer.content == f"{broken} So.", text
            assert [(call.index, call.name, call.arguments) for call in answer.calls] == [
                (0, "get_weather", '{"city": "Oslo"}')
            ]


def test_a_bare_object_is_a_call_only_of_a_function_that_exists() -> None:
    for text in ('{"name": "Ada", "parameters": {"age": 36}}', "[1, 2]", '{"a": 1}', "[x(1)]"):
        for name in ("llama", "generic", "pythonic"):
            router = reader(name)
            assert fold([router.push(text), router.finish()]) == Delta(content=text)


def test_models_habits_are_understood() -> None:
    oslo = {"city": "Oslo"}
    for name, text in [
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}'),  # no end
        ("hermes", '<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_weather"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}</tool_call>'),  # a brace too few
        ("hermes", '<tool_call>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]</tool_call>'),
        ("llama", '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo"}}'),
        ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "abc123XYZ"}]'),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}'),
        ("mistral_args", '[TOOL_CALLS]get_weather[CALL_ID]abc123XYZ[ARGS]{"city": "Oslo"}'),
        ("mistral_args", '[TOOL_CALLS]get_weather{"city": "Oslo"}'),
        ("deepseek", WRITERS["deepseek_v31"]([("get_weather", oslo)])),
        ("qwen3_coder", "<function=get_weather><parameter=city>Oslo</parameter></function>"),
        ("glm", "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>"),
        ("granite", '<function_call> {"name": "get_weather", "arguments": {"city": "Oslo"}}'),
        ("phi4", 'functools[{"name": "get_weather", "arguments": {"city": "Oslo"}}]'),
        ("command_r", 'Action:\n```json\n[\n{"tool_name": "get_weather",\n"parameters": {"city": "Oslo"}\n}\n]```'),
        ("gemma", "```tool_code\nprint(get_weather(city='Oslo'))\n```"),
        ("pythonic", "<|python_start|>[get_weather(city='Oslo',)]<|python_end|>"),
        ("generic", '```json\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n```'),
        ("harmony", '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}'),
        ("harmony", ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'),
    ]:  # fmt: skip
        router = reader(name)
        answer = fold([router.push(text), router.finish()])
        assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [("get_weather", oslo)], text
        assert answer.content == "", text


def test_values_in_tags_take_the_types_of_the_schema() -> None:
    text = (
        "<tool_call><function=get_weather><parameter=city>12</parameter><parameter=days>3</parameter>"
        "<parameter=sure>True</parameter><parameter=tags>['a', \"b\"]</parameter><parameter=unit>null</parameter>"
        '<parameter=heat>hot</parameter><parameter=other>{"x": 1}</parameter></function></tool_call>'
    )
    router = reader("qwen3_coder")
    answer = fold([router.push(text), router.finish()])
    assert json.loads(answer.calls[0].arguments) == {
        "city": "12", "days": 3, "sure": True, "tags": ["a", "b"], "unit": None, "heat": "hot", "other": {"x": 1},
    }  # fmt: skip


def test_a_text_that_looks_like_a_number_stays_a_text_where_the_schema_wants_one() -> None:
    text = "<tool_call><function=get_weather><parameter=unit>12</parameter></function></tool_call>"
    router = reader("qwen3_coder")
    answer = fold([router.push(text), router.finish()])
    assert json.loads(answer.calls[0].arguments) == {"unit": "12"}


@pytest.mark.parametrize("value", ['"\\u12G4"', '"\\x"', "01", "1.", "nul", "NaN", "[,1]", '{"b" 1}', "{,}", "[}"])
def test_what_is_no_json_is_no_call(value: str) -> None:
    text = f'<tool_call>{{"name": "now", "arguments": {{"a": {value}}}}}</tool_call>'
    router = reader("hermes")
    assert fold([router.push(text), router.finish()]).content == text
    assert router.complete_calls == 0


def test_line_breaks_that_json_forbids_are_escaped() -> None:
    router = reader("hermes")
    answer = fold(
        [router.push('<tool_call>{"name": "now", "arguments": {"a": "x\ny\t"}}</tool_call>'), router.finish()]
    )
    assert json.loads(answer.calls[0].arguments) == {"a": "x\ny\t"}


HARMONY = (
    "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Oslo"}<|call|>'
)


def test_harmony_channels_are_thought_content_and_call() -> None:
    template = EXCERPTS["harmony"]
    expected = Delta("Let me see.", "I look.", (CallDelta(0, '{"city": "Oslo"}', "id0", "get_weather"),))
    for places in ([], range(len(HARMONY)), *([place] for place in range(len(HARMONY)))):
        reasoning = reasoning_of(template, "<|start|>assistant")
        router = router_of(template, tools=TOOLS, reasoning=reasoning, new_id=lambda: "id0")
        assert fold([*map(router.push, cut(HARMONY, list(places))), router.finish()]) == expected
    router = router_of(template, reasoning=reasoning_of(template, ""))
    router.push("<|channel|>analysis<|message|>Hm")
    assert router.in_reasoning
    router.push("<|end|><|start|>assistant<|channel|>final<|message|>")
    assert not router.in_reasoning
    assert router.push("Yes") == Delta(content="Yes")
    assert {"<|channel|>", "<|message|>"} <= router.markers


def test_ids_are_what_the_models_templates_take() -> None:
    for name, length, prefix in (("hermes", 29, "call_"), ("mistral", 9, "")):
        text = WRITERS[name]([("now", {}), ("now", {})])
        router = router_of("", parser=name, tools=TOOLS)
        ids = [call.id for call in fold([router.push(text), router.finish()]).calls]
        assert len(set(ids)) == 2
        for made in ids:
            assert made is not None
            assert len(made) == length
            assert made.startswith(prefix)
            assert made.removeprefix(prefix).isalnum()


def test_plain_text_costs_little() -> None:
    router = router_of(THINK, tools=TOOLS, reasoning=reasoning_of(THINK, "<think>"))
    router.push("thought</think>\n\n")
    begun = time.perf_counter()
    for _ in range(5000):
        router.push("word ")
    assert (time.perf_counter() - begun) / 5000 < 60e-6


def test_a_tag_inside_of_a_text_of_a_list_is_none() -> None:
    for value, read in (
        ('["a</parameter>b", "</parameter>"]', ["a</parameter>b", "</parameter>"]),
        ('["a", "b"]', ["a", "b"]),
        ("['say \"hi']", ['say "hi']),
        ("[1", "[1"),
    ):
        tags = f"<parameter=tags>{value}</parameter><parameter=days>3</parameter>"
        text = f"<tool_call><function=get_weather>{tags}</function></tool_call>"
        for pieces in ([text], list(text)):
            router = reader("qwen3_coder")
            answer = fold([*map(router.push, pieces), router.finish()])
            assert json.loads(answer.calls[0].arguments) == {"tags": read, "days": 3}
