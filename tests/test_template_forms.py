"""Messages that a template does not support are converted to the form that it was written for."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmill.errors import TemplateError
from tokenmill.text.chat_template import ChatTemplate

TEXT_ONLY = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
TEXT_ADDED = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
PARTS_ONLY = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}({{ p.text }}){% endfor %}{% endif %}{% endfor %}"
)
SYSTEM_TEXT = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content | trim }}{% set messages = messages[1:] %}"
    "{% endif %}" + EITHER
)
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def render(template: str, *messages: dict[str, Any], **more: Any) -> str:
    return ChatTemplate(template, "<s>", "</s>").render(list(messages), add_generation_prompt=False, **more)


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (TEXT_ONLY, PARTS, "<user>ab"),
        (TEXT_ADDED, PARTS, "<user>ab"),
        (PARTS_ONLY, PARTS, "<user>ab"),
        (EITHER, PARTS, "<user>(a)(b)"),
        (TEXT_ONLY, "ab", "<user>ab"),
        (PARTS_ONLY, "ab", "<user>ab"),
        (EITHER, "ab", "<user>ab"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{% endfor %}", PARTS, '<user>"ab"'),
    ],
)
def test_contents_reach_every_kind_of_template(template: str, content: Any, expected: str) -> None:
    message = {"role": "user", "content": content}
    assert render(template, message) == expected
    assert message == {"role": "user", "content": content}


def test_each_role_has_its_own_form() -> None:
    messages = [{"role": "system", "content": PARTS}, {"role": "user", "content": PARTS}]
    assert render(SYSTEM_TEXT, *messages) == "<system>ab<user>(a)(b)"


def test_parts_that_are_no_text_stay_what_they_are() -> None:
    image = [{"type": "image"}, {"type": "text", "text": "a"}]
    assert render(EITHER, {"role": "user", "content": image}) == "<user>()(a)"
    assert "'image'" in render("{{ messages[0].content }}", {"role": "user", "content": image})


def test_a_developers_message_is_the_systems_where_only_that_is_known() -> None:
    known = (
        "{% for m in messages %}{% if m.role in ['system', 'user'] %}<{{ m.role }}>{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    refused = (
        "{% for m in messages %}{% if m.role not in ['system', 'user'] %}{{ raise_exception('role') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": "hi"}]
    assert render(known, *messages) == render(refused, *messages) == "<system>be<user>hi"
    assert render(EITHER, *messages) == "<developer>be<user>hi"


CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}@{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("c.function.arguments", '{"a": "é"}'),
        ("'json ' + c.function.arguments", 'json {"a": "é"}'),
        ("c.function.arguments | tojson", '{"a": "é"}'),
        ("c.function | tojson", '{"name": "f", "arguments": {"a": "é"}}'),
        ("c.function.arguments if c.function.arguments is string else c.function.arguments | tojson", '{"a": "é"}'),
        ("c.function.arguments.items() | list", "[('a', 'é')]"),
    ],
)
@pytest.mark.parametrize("arguments", ['{"a": "é"}', {"a": "é"}])
def test_arguments_are_written_as_the_model_knows_them(what: str, expected: str, arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert render(CALLS.replace("@", f"{{{{ {what} }}}}"), {"role": "user", "content": "x"}, message) == expected
    assert call["function"] == {"name": "f", "arguments": arguments}


def test_arguments_that_are_no_object_stay_text() -> None:
    template = CALLS.replace("@", "{{ c.function.arguments | tojson }}")
    for arguments in ("not json", "[1]"):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        out = render(template, {"role": "assistant", "content": "", "tool_calls": [call]})
        assert out == f'"{arguments}"'
    call = {"type": "function", "function": {"name": "f"}}
    named = CALLS.replace("@", "{{ c.function.name }}")
    assert render(named, {"role": "assistant", "content": "", "tool_calls": [call]}) == "f"


def test_a_content_of_null_is_empty_where_the_template_fails_on_it() -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    searches = (
        "{% for m in messages %}{{ '+' if '<think>' in m.content }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}{% endfor %}"
    )
    assert render(searches, message) == "[find]"
    only_null = (
        "{% for m in messages %}{% if m.content is none %}{% for c in m.tool_calls %}{{ c.id + c.function.arguments }}"
        "{% endfor %}{% endif %}{% endfor %}"
    )
    assert render(only_null, {**message, "tool_calls": [{**call, "id": "7"}]}) == "7{}"
    with pytest.raises(TemplateError, match="an object has no 'id'"):  # an empty id would lose the call silently
        render(only_null, message)


def test_calls_that_a_template_cannot_write_are_not_lost() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    written = '[{"id":"1","type":"function","function":{"name":"f","arguments":"{}"}}]'
    for template in (TEXT_ONLY, TEXT_ADDED):
        assert render(template, {"role": "assistant", "content": None, "tool_calls": [call]}) == "<assistant>" + written
        assert render(template, {"role": "assistant", "tool_calls": [call]}) == "<assistant>" + written
        assert render(template, {"role": "assistant", "content": "so", "tool_calls": [call]}) == "<assistant>so"


def test_a_template_that_refuses_is_not_tried_again() -> None:
    template = "{% if messages[0].content is none %}{{ raise_exception('no content') }}{% endif %}[f]"
    with pytest.raises(TemplateError, match="no content"):
        render(template, {"role": "assistant", "content": None})


def test_roles_that_clients_make_up_fill_no_memory() -> None:
    template = ChatTemplate(TEXT_ONLY)
    for i in range(200):
        assert template.render([{"role": f"r{i}", "content": PARTS}], add_generation_prompt=False) == f"<r{i}>ab"


KINDS = {
    "tojson": "{{ c.function.arguments | tojson }}",
    "whole": "{{ c.function | tojson }}",
    "items": "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}",
    "filter": "{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v | tojson }}{% endfor %}",
    "loop": "{% for k in c.function.arguments %}<{{ k }}>{{ c.function.arguments[k] }}{% endfor %}",
    "text": "{{ 'json ' + c.function.arguments }}",
    "asks": "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
    "refuses": "{{ raise_exception('no object') if c.function.arguments is not mapping }}"
    "{{ c.function.arguments | tojson }}",
}
NOTHING: list[Any] = ["", "  ", None, "null", {}, "{}"]
CUT = ['{"a": "b\\n', '{"a"', "[1, 2]", '"x"', "just words", "42", "true", "NaN", '{"a": 1}}', "{'a': 1}", "{" * 2000]


def called(arguments: Any, **fields: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **fields}


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_are_no_object_are_the_text_that_they_were_in_every_template(kind: str) -> None:
    template = CALLS.replace("@", KINDS[kind])
    for text in CUT:
        assert text in render(template, called(text)), text
    assert "[1, 2]" in render(template, called([1, 2]))
    assert "4.5" in render(template, called(4.5))


@pytest.mark.parametrize("kind", KINDS)
def test_no_arguments_are_an_empty_object_in_every_template(kind: str) -> None:
    template = CALLS.replace("@", KINDS[kind])
    empty = {"whole": '{"name": "f", "arguments": {}}', "text": "json {}", "items": "", "filter": "", "loop": ""}
    for arguments in NOTHING:
        written = render(template, called(arguments))
        if kind in ("tojson", "whole") and isinstance(arguments, str):
            written = written.replace('"{}"', "{}")
        assert written == empty.get(kind, "{}"), arguments
    without = called("")
    del without["tool_calls"][0]["function"]["arguments"]
    assert render(template, without) == render(template, called(""))


def test_words_of_a_message_are_never_taken_for_the_text_of_a_call() -> None:
    template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}@{% endfor %}{% endfor %}"
    template = template.replace("@", KINDS["items"])
    texts = ["tokenmill0x", "<", "tokenmillmark0"]
    out = render(template, *(called(text, content=f"{text}!") for text in texts))
    assert out == "".join(f"{text}!<arguments>{text}" for text in texts)


SHORT_IDS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id is not defined or c.id | length != 9 %}"
    "{{ raise_exception('nine letters') }}{% endif %}[{{ c.id }}]{{ c.function | tojson }}{% endfor %}"
    "{% if m.role == 'tool' %}({{ m.tool_call_id }}){% endif %}{% endfor %}"
)


def test_ids_are_what_a_template_insists_on_and_the_same_from_turn_to_turn() -> None:
    def turn(call_id: str) -> list[dict[str, Any]]:
        message = called("{}")
        message["tool_calls"][0]["id"] = call_id
        return [message, {"role": "tool", "tool_call_id": call_id, "content": "x"}]

    first = render(SHORT_IDS, *turn("call_0123456789"))
    assert first.startswith(render(SHORT_IDS, *turn("call_0123456789")[:1]))
    assert first[1:10] == first[-10:-1]
    assert render(SHORT_IDS, *turn("call_0123456789"), *turn("functions.f:0"), *turn("abc123XYZ")).startswith(first)
    assert render(SHORT_IDS, *turn("abc123XYZ")).startswith("[abc123XYZ]")
    any_id = SHORT_IDS.replace("!= 9", "== 0")
    assert render(any_id, *turn("call_0123456789")).startswith("[call_0123456789]")


def test_a_template_that_writes_only_the_id_gets_one_with_the_name() -> None:
    kimi = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}<|tool_call_begin|>{{ c.id }}|"
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}{% endfor %}"
        "{% if m.role == 'tool' %}({{ m.tool_call_id }}){% endif %}{% endfor %}"
    )
    message = called("{}")
    out = render(kimi, message, {"role": "tool", "tool_call_id": "1", "content": "x"})
    assert out == "<|tool_call_begin|>functions.f:0|{}(functions.f:0)"


def test_several_calls_come_one_by_one_where_a_template_takes_one() -> None:
    single = (
        "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one') }}"
        "{% endif %}[{{ m.tool_calls[0].function | tojson }}]{% else %}{{ m.role }}:{{ m.content }};{% endif %}"
        "{% endfor %}"
    )
    first_only = single.replace("!= 1", "== 0")
    message = called('{"a": 1}')
    message["tool_calls"].append({"id": "2", "type": "function", "function": {"name": "g", "arguments": '{"b": 2}'}})
    results = [{"role": "tool", "tool_call_id": one, "content": one} for one in "12"]
    for template in (single, first_only):
        out = render(template, message, *results)
        assert out == ('[{"name": "f", "arguments": {"a": 1}}]tool:1;[{"name": "g", "arguments": {"b": 2}}]tool:2;')


def test_calls_beside_a_text_are_not_lost_where_a_template_wants_them_alone() -> None:
    alone = (
        "{% for m in messages %}{% if m.content is none %}{% for c in m.tool_calls %}[{{ c.function.arguments }}]"
        "{% endfor %}{% else %}{{ m.content }};{% endif %}{% endfor %}"
    )
    assert render(alone, called('{"a": 1}', content="I look.")) == 'I look.;[{"a": 1}]'
    assert render(alone, called('{"a": 1}')) == '[{"a": 1}]'


def test_a_content_of_null_is_not_the_word_none() -> None:
    prints = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}@{% endfor %}{% endfor %}"
    assert render(prints.replace("@", KINDS["tojson"]), called({"a": 1}, content=None)) == '{"a": 1}'


def test_results_are_told_by_the_user_where_turns_must_alternate() -> None:
    alternates = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    user = {"role": "user", "content": "hi"}
    results = [{"role": "tool", "tool_call_id": one, "content": one} for one in "12"]
    out = render(alternates, user, {"role": "assistant", "content": "f()"}, *results)
    assert out == "<user>hi<assistant>f()<user>1\n2"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_a_thought_reaches_a_template_that_reads_it_under_any_name(name: str) -> None:
    template = "{% for m in messages %}{% if m.NAME %}({{ m.NAME }}){% endif %}{{ m.content }}{% endfor %}"
    template = template.replace("NAME", name)
    for given in ("reasoning", "reasoning_content"):
        assert render(template, {"role": "assistant", "content": "Hi", given: "Hm"}) == "(Hm)Hi"


def test_an_empty_answer_is_a_blank_where_a_template_refuses_it() -> None:
    template = (
        "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}[{{ m.content }}]"
        "{% endfor %}"
    )
    assert render(template, {"role": "assistant", "content": ""}) == "[ ]"
    with pytest.raises(TemplateError, match="empty"):
        render(template, {"role": "user", "content": ""})


def test_a_refusal_is_rendered_as_text() -> None:
    for message in ({"content": None, "refusal": "No."}, {"content": [{"type": "refusal", "refusal": "No."}]}):
        assert render(TEXT_ONLY, {"role": "assistant", **message}) == "<assistant>No."
