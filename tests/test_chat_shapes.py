"""Tools and a response format in one request: the answer is calls, or text of that format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support_chat import (
    ASKS,
    CHANNELS,
    FORMAT,
    HARMONY,
    MARKS,
    OPENS,
    STRICT,
    USER,
    follows,
    model_of,
    planned,
)  # fmt: skip
from support_server import scripted

from tokenmill.errors import ToolError
from tokenmill.text.router import fold

CHAT = "{% for message in messages %}{{ message.content }}</s>{% endfor %}"
TEMPLATES = {
    "hermes": "{# <tool_call> #}",
    "llama": '{# Respond with {"name": function name, "parameters": arguments} #}',
    "pythonic": "{# [func_name1(a=1)] #}",
    "generic": "",
    "qwen3_coder": "{# <function= <parameter= #}",
}
SEPARATORS = {"llama": "; ", "generic": ", "}
FREE = {"type": "function", "function": {"name": "now"}}
CALLS = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    "llama": '{"name": "f", "parameters": {"a": 1}}',
    "pythonic": "[f(a=1)]",
    "generic": '{"name": "f", "arguments": {"a": 1}}',
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
}


@pytest.mark.parametrize("special", [("<tool_call>", "</tool_call>"), ()])
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_calls_or_has_the_shape(tmp_path: Path, name: str, special: tuple[str, ...]) -> None:
    made = model_of(tmp_path, CHAT + TEMPLATES[name], special)
    found = planned(made, tools=[STRICT, FREE], **FORMAT)
    assert found.options.grammar is not None
    assert (found.options.grammar_field, found.options.grammar.after) == ("response_format", ())
    call = CALLS[name]
    for text, good in (('{"a": 5}', True), ('{"a": "x"}', False), (call, True), (call.replace("1", '"x"'), False),
                       ("Hello", False), ("", False), (f"So: {call}", False), ('{"a": 5} ' + call, False)):  # fmt: skip
        assert follows(made, found.options.grammar, text) == good, text
    assert found.reader.router is not None
    several = call[:-1] + ", " + call[1:] if name == "pythonic" else call + SEPARATORS.get(name, "\n") + call
    assert follows(made, found.options.grammar, several)
    in_text, later = f'{{"b": "{call}"}}', f"{call} So: {call}"
    for text, content, calls in (('{"a": 5}', '{"a": 5}', 0), (call, "", 1), (several, "", 2), (in_text, in_text, 0),
                                 (later, f"So: {call}", 1)):  # fmt: skip
        for pieces in ([text], list(text)):
            router = found.reader.router()
            answer = fold([*map(router.push, pieces), router.finish()])
            assert (answer.content.lstrip(), len(answer.calls)) == (content, calls), text


def test_where_a_call_must_come_there_is_nothing_else(tmp_path: Path) -> None:
    made = model_of(tmp_path, CHAT + TEMPLATES["hermes"])
    for choice in ("required", "f", {"type": "function", "function": {"name": "f"}}):
        found = planned(made, tools=[STRICT, FREE], tool_choice=choice, **FORMAT)
        assert found.options.grammar is not None
        assert found.options.grammar_field == "tool_choice"
        assert follows(made, found.options.grammar, CALLS["hermes"])
        assert not follows(made, found.options.grammar, '{"a": 5}')


@pytest.mark.parametrize("fields", [{"tools": [STRICT], "tool_choice": "none"}, {"tools": []}])
def test_where_no_call_may_come_there_is_the_shape(tmp_path: Path, fields: dict[str, Any]) -> None:
    found = planned(model_of(tmp_path, CHAT + TEMPLATES["hermes"]), **fields, **FORMAT)
    assert found.options.grammar is not None
    assert (found.options.grammar.kind, found.options.grammar_field) == ("json_schema", "response_format")
    assert found.reader.router is None


def test_a_thought_may_come_before_either(tmp_path: Path) -> None:
    thought = 'Call or {"a": 1}?\n</think>'
    for number, (template, before) in enumerate(((ASKS, f"<think>\n{thought}\n\n"), (OPENS, thought))):
        folder = tmp_path / str(number)
        folder.mkdir()
        made = model_of(folder, template + TEMPLATES["hermes"], (*MARKS, "<tool_call>", "</tool_call>"))
        found = planned(made, tools=[STRICT], **FORMAT)
        assert found.options.grammar is not None
        for text in ('{"a": 5}', CALLS["hermes"]):
            assert follows(made, found.options.grammar, before + text), text
            assert not follows(made, found.options.grammar, before + text.replace("1", "x").replace("5", "x")), text


def test_channels_have_calls_or_a_final_message_of_the_shape(tmp_path: Path) -> None:
    made = model_of(tmp_path, HARMONY, CHANNELS)
    found = planned(made, tools=[STRICT], **FORMAT)
    assert found.options.grammar is not None
    call = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 5}<|call|>'
    for before in ("", "<|channel|>analysis<|message|>Well…<|end|><|start|>assistant"):
        for text in (call, '<|channel|>final<|message|>{"a": 5}'):
            assert follows(made, found.options.grammar, before + text), before + text
            assert not follows(made, found.options.grammar, before + text.replace("5", "x")), before + text
    assert not follows(made, found.options.grammar, "<|channel|>final<|message|>Hello")


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"guided_choice": ["yes", "no"]}, "no", "maybe"),
        ({"guided_regex": "(?:[a-z <>_\\n]|\\{.*)+"}, "hi <b>", "<tool_call>\n{1"),
    ],
)
def test_other_shapes_stand_beside_calls_with_marks(tmp_path: Path, fields: Any, good: str, bad: str) -> None:
    made = model_of(tmp_path, CHAT + TEMPLATES["hermes"], ())
    found = planned(made, tools=[STRICT], **fields)
    assert found.options.grammar is not None
    for text, fits in ((good, True), (CALLS["hermes"], True), (bad, False)):
        assert follows(made, found.options.grammar, text) == fits, text


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("llama", {"guided_regex": "a+"}),
        ("pythonic", {"guided_choice": ["a"]}),
        ("hermes", {"guided_grammar": "start: /a/"}),
        ("llama", {"response_format": {"type": "json_object"}}),
        ("generic", {"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {
            "type": "object", "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}}}}}}),
    ],
)  # fmt: skip
def test_what_could_not_be_told_from_calls_is_refused_by_name(tmp_path: Path, template: str, fields: Any) -> None:
    with pytest.raises(ToolError, match="cannot stand beside") as caught:
        planned(model_of(tmp_path, CHAT + TEMPLATES[template]), tools=[STRICT], **fields)
    assert caught.value.param == next(iter(fields))


def test_an_object_of_any_kind_may_stand_beside_functions_that_are_not_strict(tmp_path: Path) -> None:
    made = model_of(tmp_path, CHAT + TEMPLATES["llama"])
    found = planned(made, tools=[FREE], response_format={"type": "json_object"})
    assert found.options.grammar is not None
    for text in ('{"name": "Ada", "x": [1]}', '{"name": "now", "parameters": {"a": 1}}'):
        assert follows(made, found.options.grammar, text)
    named = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
    shaped = planned(made, tools=[STRICT], response_format={"type": "json_schema", "json_schema": {"schema": named}})
    assert shaped.reader.router is not None
    router = shaped.reader.router()
    assert router.push('{"name": "f", "age": 3}').calls == router.finish().calls == ()


@pytest.mark.parametrize("special", [("<tool_call>", "</tool_call>"), ()])
@pytest.mark.parametrize("name", TEMPLATES)
def test_only_allowed_tools_are_called(tmp_path: Path, name: str, special: tuple[str, ...]) -> None:
    made = model_of(tmp_path, CHAT + TEMPLATES[name], special)
    loose = {"type": "function", "function": {**STRICT["function"], "strict": False}}
    call = CALLS[name]
    other = call.replace("=f", "=now").replace('"f"', '"now"').replace("f(", "now(")
    for mode in ("auto", "required"):
        among = {"mode": mode, "tools": [{"type": "function", "function": {"name": "f"}}]}
        found = planned(made, tools=[loose, FREE], tool_choice={"type": "allowed_tools", "allowed_tools": among})
        assert found.options.grammar is not None
        assert found.options.grammar_field == "tool_choice"
        assert follows(made, found.options.grammar, call)
        assert found.options.grammar.after or follows(made, found.options.grammar, "Hello") == (mode == "auto")
        assert found.reader.router is not None
        router = found.reader.router()
        made_up = fold([router.push(other), router.finish()]).calls
        assert not follows(made, found.options.grammar, other) or not made_up  # it may be text, but is no call
    everything = planned(made, tools=[loose, FREE], tool_choice={"type": "allowed_tools", "allowed_tools": {
        "mode": "auto", "tools": [loose, FREE]}})  # fmt: skip
    assert everything.options.grammar is None


def test_both_come_through_the_server(tmp_path: Path) -> None:
    body = {"messages": USER, "tools": [STRICT], **FORMAT}
    content = json.dumps({"a": 1, "b": CALLS["hermes"]})
    for number, (said, calls) in enumerate(((content, 0), (CALLS["hermes"], 1))):
        folder = tmp_path / str(number)
        folder.mkdir()
        with scripted(folder, text=said, template=CHAT + TEMPLATES["hermes"]) as server:
            response = server.post("/v1/chat/completions", body)
            assert response.status_code == 200, response.text
            (choice,) = response.json()["choices"]
            assert len(choice["message"].get("tool_calls", ())) == calls
            assert choice["message"]["content"] == (None if calls else content)
            assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
            unclear = {**body, "guided_grammar": "start: /a/", "response_format": None}
            refused = server.post("/v1/chat/completions", unclear)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "guided_grammar")
