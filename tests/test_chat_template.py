# ruff: noqa: E501 - templates are written as their models have them
from __future__ import annotations

import json
from time import perf_counter
from typing import Any

import pytest
from support_text import byte_level

from tokenmill.errors import TemplateError
from tokenmill.text import growth, sandbox
from tokenmill.text.chat_template import ChatTemplate

CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nBe kind.<|im_end|>' }}
    {% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate!') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
TOOLS = """{%- macro kind(p) -%}{{ p.type }}{% if p.enum is defined %} of {{ p.enum | join(', ') }}{% endif %}{%- endmacro -%}
{%- set ns = namespace(calls=0) -%}
{%- if tools %}{% for tool in tools %}
{{ tool.function.name }}: {{ tool.function | tojson }} {{ tool.function.parameters.properties | tojson(indent=2) }}
{%- for name, p in tool.function.parameters.properties | items %} {{ name ~ '=' ~ kind(p) }}{% endfor %}
{%- endfor %}{% endif %}
{%- for message in messages %}
{%- generation %}[{{ message.role | upper }}]{% endgeneration %}
{%- if message.tool_calls is defined %}{% for call in message.tool_calls %}{% set ns.calls = ns.calls + 1 %}
<call {{ ns.calls }}>{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
{%- for key, value in call.function.arguments.items() %} {{ key }}:{{ value }}{% endfor %}
{%- endfor %}{% elif message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<{{ part.type }}>{% endif %}{% if loop.last %}{% break %}{% endif %}{% endfor %}
{%- endif %}{{ none_such }}{{ message.get('name', '') }}{{ '%02d' % 3 }}{{ 'x' * 2 }}
{%- endfor %}{% if documents %}{% for d in documents %}{{ d.title.title() }}{% endfor %}{% endif %}{{ extra | default('no extra') }}
"""  # fmt: skip
ODDS = """{{ pad_token }}{{ messages | tojson }}{{ sep_token }}
{% for m in messages recursive %}{{ m.role if m is mapping else m }}{% if m is mapping %}{{ loop(m.values()) }}{% endif %}{% else %}none{% endfor %}
{% set block %}{{ messages | length ~ 'n' ~ none ~ true ~ 1.5 }}{% endset %}{{ block }}
{% macro quote(text, mark='"') %}{{ mark ~ text ~ mark }}{{ caller() if caller }}{% endmacro %}{{ quote('a', mark="'") }}
{% call quote('b') %}inside {{ 'c' ~ 'd' }}{% endcall %}{% filter upper %}loud {{ 1 + 2 * 3 ** 2 }}{% endfilter %}
{{ messages[::-1] | map(attribute='role') | join('+') }}{{ 'a%sb%d' % ('x', 3) }}{{ '{:>5}|{}'.format('r', 2) }}{{ [1] + [2] }}{{ [0] * 3 }}
{% for a in 'xyz' if a != 'y' %}{{ loop.index }}{{ a }}{{ loop.cycle('-', '+') }}{% continue %}{% endfor %}{{ 'abc'.center(9) }}{{ 'q' | center(5) }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ '<&>' }}{{ '<&>' | e }}{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}
"""
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Zürich", "<b>"]}, "at": {"type": "integer"}},
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "It's <here> & 'there'", "parameters": PARAMETERS},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "at": 3}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi there"}],
    "system": [{"role": "system", "content": "Sys"}, {"role": "user", "content": " a\n<b> & 'c' "}],
    "turns": [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two  "},
        {"role": "user", "content": "日本語 🙂"},
    ],
}
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image"}, {"type": "text", "text": "!"}]}
]
CALLS = [
    *CHATS["one"],
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "12°"},
]


def theirs(template: str, chat: list[dict[str, Any]], **more: Any) -> str:
    """Return transformers' rendering."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    more.setdefault("add_generation_prompt", not more.get("continue_final_message"))
    text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **more)
    assert isinstance(text, str)
    return text


def ours(template: str, chat: list[dict[str, Any]], **more: Any) -> str:
    return ChatTemplate(template, "<s>", "</s>", {"pad_token": "<pad>"}).render(chat, **more)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, TOOLS, ODDS])
@pytest.mark.parametrize("chat", sorted(CHATS))
@pytest.mark.parametrize("begins", [True, False])
def test_conversations_are_rendered_as_transformers_renders_them(template: str, chat: str, begins: bool) -> None:
    assert ours(template, CHATS[chat], add_generation_prompt=begins) == theirs(
        template, CHATS[chat], add_generation_prompt=begins
    )


@pytest.mark.parametrize("chat", [PARTS, CALLS, CHATS["turns"]])
@pytest.mark.parametrize("tools", [None, [], [TOOL], [TOOL, TOOL]])
def test_tools_documents_and_parts_are_rendered_as_transformers_renders_them(chat: Any, tools: Any) -> None:
    documents = [{"title": "a title", "text": "x"}]
    expected = theirs(TOOLS, chat, tools=tools, documents=documents, extra="yes")
    assert ours(TOOLS, chat, tools=tools, documents=documents, kwargs={"extra": "yes"}) == expected
    assert chat == json.loads(json.dumps(chat))


@pytest.mark.parametrize("template", [CHATML, TOOLS])
@pytest.mark.parametrize("start", ["Sure, ", "Two", " \n Sure: ```"])
def test_the_last_message_is_continued_as_transformers_continues_it(template: str, start: str) -> None:
    chat = [*CHATS["one"], {"role": "assistant", "content": start}]
    expected = theirs(template, chat, continue_final_message=True)
    assert ours(template, chat, continue_final_message=True) == expected
    assert ours(template, chat) == expected, "an assistant's last message is continued without being asked to"
    assert ours(template, chat, add_generation_prompt=True) == theirs(template, chat)
    parts = [*CHATS["one"], {"role": "assistant", "content": [{"type": "text", "text": start}]}]
    if template is TOOLS:
        assert ours(template, parts) == theirs(template, parts, continue_final_message=True)
    assert chat[-1]["content"] == start


def test_a_message_that_the_template_drops_cannot_be_continued() -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    chat = [*CHATS["one"], {"role": "assistant", "content": "gone"}]
    assert ours(template, chat) == "Hi there>"
    with pytest.raises(TemplateError, match="continue_final_message"):
        ours(template, chat, continue_final_message=True)
    with pytest.raises(TemplateError, match="cannot both be true"):
        ours(template, chat, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(TemplateError, match="needs a last message with text"):
        ours(template, [{"role": "assistant", "content": None}], continue_final_message=True)


def test_dates_are_todays() -> None:
    assert ours("{{ strftime_now('%Y-%m-%d') }}", []) == theirs(
        "{{ strftime_now('%Y-%m-%d') }}", [{"role": "user", "content": ""}]
    )


def test_lists_of_parts_become_text_where_a_template_wants_text() -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "ab<|im_end|>" in ours(CHATML, chat)
    assert "ab[/INST]" in ours(LLAMA2, chat).replace(" ", "")
    looped = "{% for m in messages %}{% set c = m['content'] %}{% for p in c %}({{ p.text }}){% endfor %}{% endfor %}"
    assert ours(looped, chat) == "(a)(b)"
    assert ours("{{ messages[0].content[0].text }}", chat) == "a"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ c.function.arguments | tojson }}", '{"a": 1}'),
        ("{% set x = c.function.arguments %}{% for k, v in x.items() %}{{ k }}={{ v }}{% endfor %}", "a=1"),
        ("{% for k, v in c['function']['arguments']|items %}{{ k }}={{ v }}{% endfor %}", "a=1"),
        ("{{ 'json ' + c.function.arguments }}", 'json {"a": 1}'),
        ("{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments|tojson }}{% endif %}", '{"a": 1}'),
    ],
)  # fmt: skip
def test_arguments_are_what_the_template_makes_of_them(template: str, expected: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    chat = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert ours("{% set c = messages[0].tool_calls[0] %}" + template, chat) == expected
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}


def test_what_a_template_raises_is_the_clients_error() -> None:
    turns = [{"role": "assistant", "content": "no"}, {"role": "user", "content": "x"}]
    with pytest.raises(TemplateError, match=r"^Roles must alternate! \(line 1 of the chat template\)$"):
        ours(LLAMA2, turns)
    with pytest.raises(TemplateError, match="a list has no element 5"):
        ours("{{ messages[5].content.x }}", CHATS["one"])
    with pytest.raises(TemplateError, match=r"wrong in line 2: `{% if %}`$"):
        ours("\n{% if %}", CHATS["one"])
    with pytest.raises(TemplateError, match="TypeError"):
        ours("{{ 'a' + 1 }}", CHATS["one"])
    with pytest.raises(
        TemplateError,
        match=r"ZeroDivisionError: `{{ 1 / x }}{% endmacro %}` \(line 3 of the chat template 'tool_use'\)$",
    ):
        ChatTemplate({"default": "", "tool_use": "{% macro f(x) %}\n\n{{ 1 / x }}{% endmacro %}\n\n{{ f(0) }}"}).render(
            CHATS["one"], tools=[TOOL]
        )
    with pytest.raises(TemplateError, match="no chat template 'default', only other"):
        ChatTemplate({"other": "x"}).render(CHATS["one"])


@pytest.mark.parametrize("name", ["messages", "tokenize", "tools", "add_generation_prompt", "chat_template", "_x"])
def test_a_request_cannot_set_what_is_the_servers(name: str) -> None:
    with pytest.raises(TemplateError, match=name):
        ours("x", CHATS["one"], kwargs={name: True})


def test_a_request_may_bring_documents_and_name_a_template() -> None:
    named = ChatTemplate({"default": "plain", "rag": "{% for d in documents %}{{ d.title }}{% endfor %}"})
    documents = [{"title": "a"}, {"title": "b"}]
    assert named.render(CHATS["one"], kwargs={"documents": documents}) == "plain"
    assert named.render(CHATS["one"], kwargs={"documents": documents, "chat_template": "rag"}) == "ab"
    assert named.render(CHATS["one"], documents=documents, kwargs={"chat_template": "rag"}) == "ab"
    with pytest.raises(TemplateError, match="only to a name the model has: default, rag"):
        named.render(CHATS["one"], kwargs={"chat_template": "{{ messages }}"})
    for wrong in ("a", [1], {"title": "x"}):
        with pytest.raises(TemplateError, match="'documents' must be a list of objects"):
            named.render(CHATS["one"], kwargs={"documents": wrong})


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__.__builtins__ }}",
        "{% set x = namespace.__init__.__globals__ %}{{ x.os }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ '{0.__class__.__init__}'.format(messages) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_gets_nowhere(template: str) -> None:
    try:
        out = ours(template, CHATS["one"])
    except TemplateError:
        return
    assert "class" not in out
    assert "object at" not in out
    assert "root:" not in out


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for i in range(2) %}{{ f(n) if n else '' }}{% endfor %}{% endmacro %}{{ f(1) }}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ 'a' * 99999999999 }}",
        "{{ 99999999999 * [1] }}",
        "{{ 9 ** 999999999 }}",
        "{{ 'a'.center(99999999999) }}{{ 'a'|center(99999999999) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '{:99999999999}'.format(1) }}{{ '{:{}}'.format(1, 99999999999) }}",
        "{% for a in range(99999) %}{{ messages[0].content * 9999 }}{% endfor %}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "{{ ('b' * 99999).join(range(99999)) }}{{ range(99999) | join('b' * 99999) }}",
        "{{ ('b' * 99999).join(['a'] * 99999) }}",
        "{{ (['a'] * 99999) | join('b' * 99999) }}",
        "{{ ('a\n' * 99999) | indent(99999) }}",
        "{{ ('a ' * 99999) | wordwrap(1, wrapstring='b' * 99999) }}",
        "{{ '%99999999999d' | format(1) }}",
        "{{ ('\t' * 99999).expandtabs(99999) }}",
        "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
        "{{ [1] | batch(99999999999, 'a') | list }}",
        "{{ [1] | slice(99999999999) | list }}",
        "{{ 1.5 | round(999999999, 'floor') }}",
        "{{ messages | tojson(indent=99999999999) }}",
        "{% set n = namespace(x=['a' * 99]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=['a' * 99]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
        "{% set n = namespace(x=['a' * 99]) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x ~ 'a' }}",
        "{% set n = namespace(x=['a' * 99]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | string }}",
        "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x ** 64 %}{% endfor %}{{ n.x }}",
        "{{ [['a'] * 99999] * 99999 | sum(start=[]) }}",
        "{{ lipsum(99999999) }}",
    ],
)
def test_a_template_without_end_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(growth, "MAX_CHARACTERS", 1 << 20)
    started = perf_counter()
    with pytest.raises(TemplateError):
        ours(template, CHATS["one"])
    assert perf_counter() - started < 10


def test_many_messages_are_rendered_in_time() -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 5000
    assert len(ours(CHATML, chat, add_generation_prompt=True)) > 200_000
