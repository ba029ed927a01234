"""What a template cannot take is brought into the form that it was written for."""

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
    with pytest.raises(TemplateError, match="no attribute 'id'"):  # with "" the call would be lost without a word
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
