"""Plans of chats: prompt, options and reader, without a server."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from support_chat import (
    ASKS,
    CHANNELS,
    CHAT,
    FORMAT,
    HARMONY,
    MARKS,
    OPENS,
    SCHEMA,
    STRICT,
    USER,
    chat_of,
    follows,
    ids,
    model_of,
    planned,
)  # fmt: skip

from tokenmill.errors import GrammarError, TemplateError, Unsupported, ValidationError
from tokenmill.text.answer_reader import PLAIN
from tokenmill.text.chat import ChatModel, ChatPlan, check_parsers, plan
from tokenmill.text.options import Options
from tokenmill.text.tokenizer import fixed_ids
from tokenmill.wire.messages import GrammarSpec


def opening(made: ChatModel, found: ChatPlan, **fields: Any) -> str:
    """Return the text that a plan appends to the prompt of the template."""
    template = made.tokenizer.chat_template
    assert template is not None
    rendered = template.render(fields.get("messages", USER), kwargs=fields.get("chat_template_kwargs"))
    assert found.prompt.startswith(rendered)
    return found.prompt[len(rendered) :]


def test_parsers_must_exist() -> None:
    check_parsers("hermes", "none")
    check_parsers("", "deepseek_r1")
    for names in (("morse", ""), ("", "morse")):
        with pytest.raises(Unsupported, match="morse"):
            check_parsers(*names)


def test_a_grammar_begins_behind_a_thought_that_the_prompt_has_opened(tmp_path: Path) -> None:
    made = model_of(tmp_path, OPENS)
    found = planned(made, **FORMAT)
    assert found.options.grammar is not None
    assert (found.options.grammar.kind, found.options.grammar.after) == ("json_schema", (ids(made, "</think>"),))
    assert opening(made, found) == ""
    assert found.options.grammar_field == "response_format"


WANTED: list[tuple[dict[str, Any], str, str]] = [
    (FORMAT, '{"a": 5}', '{"b": 5}'),
    ({"guided_choice": ["yes", 'no/w"ü']}, 'no/w"ü', "maybe"),
    ({"guided_regex": r"[a-z]+/\d{2}"}, "ab/12", "ab/1"),
]


@pytest.mark.parametrize("special", [MARKS, ()])
@pytest.mark.parametrize(("fields", "good", "bad"), WANTED)
def test_a_model_that_may_think_may_do_so_before_the_grammar(
    tmp_path: Path, fields: dict[str, Any], good: str, bad: str, special: tuple[str, ...]
) -> None:
    made = model_of(tmp_path, ASKS, special)
    found = planned(made, **fields)
    assert found.options.grammar is not None
    assert not found.options.grammar.after
    for before in ("", '<think>\nWell, {"b": maybe\n</think>\n\n', "<think>\n</think>"):
        assert follows(made, found.options.grammar, before + good), before
        assert not follows(made, found.options.grammar, before + bad), before
    assert not follows(made, found.options.grammar, "Well, " + good)
    assert not follows(made, found.options.grammar, "<think>" + good)


@pytest.mark.parametrize(("fields", "good", "bad"), WANTED)
def test_a_model_of_channels_answers_in_its_final_one(
    tmp_path: Path, fields: dict[str, Any], good: str, bad: str
) -> None:
    made = model_of(tmp_path, HARMONY, CHANNELS)
    found = planned(made, **fields)
    assert found.options.grammar is not None
    final = "<|channel|>final<|message|>"
    for before in (final, f"<|channel|>analysis<|message|>Well…<|end|><|start|>assistant{final}"):
        assert follows(made, found.options.grammar, before + good), before
        assert not follows(made, found.options.grammar, before + bad), before
    assert not follows(made, found.options.grammar, good)


def test_a_forced_call_comes_behind_the_thought_too(tmp_path: Path) -> None:
    template = ASKS + "{# {{ tools }} <tool_call> #}"
    made = model_of(tmp_path, template, (*MARKS, "<tool_call>", "</tool_call>"))
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    found = planned(made, tools=[tool], tool_choice="required")
    assert found.options.grammar is not None
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert follows(made, found.options.grammar, call)
    assert follows(made, found.options.grammar, f"<think>\nf?\n</think>\n\n{call}")
    assert not follows(made, found.options.grammar, call.replace("1", '"1"'))
    assert not follows(made, found.options.grammar, "Hello")
    assert planned(made, tools=[tool]).options.grammar is None


CALLS = "{# {{ tools }} <tool_call> #}"
TAGS = ("<tool_call>", "</tool_call>")
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize("special", [(*MARKS, *TAGS), MARKS, ()])
def test_a_strict_call_is_held_to_behind_thoughts_and_text(tmp_path: Path, special: tuple[str, ...]) -> None:
    made = model_of(tmp_path, ASKS + CALLS, special)
    found = planned(made, tools=[STRICT])
    assert found.options.grammar is not None
    assert found.options.grammar.after == ((ids(made, "<tool_call>"),) if TAGS[0] in special else ())
    assert found.options.grammar_field == "tools"
    bad = CALL.replace("1", '"1"')
    for text in (f"Well. {CALL} And {CALL}\nDone.", f"<think>\nf?\n</think>\n\n{CALL}", CALL):
        assert follows(made, found.options.grammar, text), text
        assert not follows(made, found.options.grammar, text.replace(CALL, bad)), text
    if TAGS[0] not in special:  # otherwise the grammar applies only after a call begins
        for text in ("", "Hello", "<think>\nf?\n</think>\n\nNo <tool_cal"):
            assert follows(made, found.options.grammar, text), text


def test_a_strict_call_is_held_to_behind_a_thought_that_the_prompt_has_opened(tmp_path: Path) -> None:
    made = model_of(tmp_path, OPENS + CALLS)
    found = planned(made, tools=[STRICT])
    assert found.options.grammar is not None
    assert found.options.grammar.after == (ids(made, "</think>"),)
    text = f"<tool_call> or not?\n</think>\n\nYes: {CALL}"
    assert follows(made, found.options.grammar, text)
    assert not follows(made, found.options.grammar, text.replace("1", "x"))


def test_a_strict_call_of_a_model_of_channels(tmp_path: Path) -> None:
    made = model_of(tmp_path, HARMONY, CHANNELS)
    found = planned(made, tools=[STRICT])
    assert found.options.grammar is not None
    thought = "<|channel|>analysis<|message|>to=functions.f?<|end|><|start|>assistant"
    call = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
    preamble = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    for text in (thought + call, thought + preamble + call, call):
        assert follows(made, found.options.grammar, text), text
        assert not follows(made, found.options.grammar, text.replace("1", "x")), text
    assert follows(made, found.options.grammar, f"{thought}<|channel|>final<|message|>Hello")
    assert not follows(made, found.options.grammar, "Hello")
    forced = planned(made, tools=[STRICT], tool_choice="required", thinking_budget=5)
    assert forced.options.grammar is not None
    assert forced.options.thought is not None
    assert follows(made, forced.options.grammar, thought + call)
    assert not follows(made, forced.options.grammar, f"{thought}<|channel|>final<|message|>Hello")
    forced_text = made.tokenizer.decode(forced.options.thought.forced_ids, False)
    assert forced_text == "<|end|><|start|>assistant"  # and then a call


def test_a_thought_that_was_asked_for_is_opened(tmp_path: Path) -> None:
    made = model_of(tmp_path, ASKS)
    found = planned(made, **FORMAT, chat_template_kwargs={"enable_thinking": True})
    assert found.options.grammar is not None
    assert (opening(made, found), found.options.grammar.after) == ("<think>\n", (ids(made, "</think>"),))
    found = planned(made, **FORMAT, chat_template_kwargs={"enable_thinking": False})
    assert found.options.grammar is not None
    assert (found.options.grammar.after, found.reader.router) == ((), None)
    assert opening(made, found, chat_template_kwargs={"enable_thinking": False}) == ""


def test_a_budget_ends_the_thought(tmp_path: Path) -> None:
    made = model_of(tmp_path, OPENS)
    end = ids(made, "</think>")
    found = planned(made, thinking_budget=7)
    assert found.options.thought is not None
    assert (found.options.thought.force_after, found.options.thought.unless) == (7, (end,))
    assert made.tokenizer.decode(found.options.thought.forced_ids, False) == "\n</think>\n\n"
    behind = planned(made, thinking_budget=7, **FORMAT).options.thought  # a grammar begins at once
    assert behind is not None
    assert made.tokenizer.decode(behind.forced_ids, False) == "\n</think>"
    none = planned(made, thinking_budget=0)
    assert (none.options.thought, opening(made, none), none.reader.router) == (None, "\n</think>\n\n", None)


def test_a_budget_needs_a_thought_whose_end_is_a_token(tmp_path: Path) -> None:
    for number, (template, special) in enumerate([(CHAT, MARKS), (OPENS, ())]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ValidationError) as caught:
            planned(model_of(folder, template, special), thinking_budget=7)
        assert caught.value.param == "thinking_budget"


@pytest.mark.parametrize("template", [OPENS, ASKS, HARMONY, CHAT])
@pytest.mark.parametrize("budget", [-1, -(10**30), 2**31])
def test_a_budget_out_of_bounds_is_refused_by_name(tmp_path: Path, template: str, budget: int) -> None:
    with pytest.raises(ValidationError, match="Invalid 'thinking_budget'") as caught:
        planned(model_of(tmp_path, template, (*MARKS, *CHANNELS)), thinking_budget=budget)
    assert caught.value.param == "thinking_budget"


def test_a_thought_whose_end_is_no_token_is_closed_before_a_grammar(tmp_path: Path) -> None:
    made = model_of(tmp_path, OPENS, ())
    found = planned(made, **FORMAT)
    assert found.options.grammar is not None
    assert (opening(made, found), found.options.grammar.after, found.reader.router) == ("\n</think>\n\n", (), None)


def test_the_thought_of_a_message_that_is_continued_goes_on(tmp_path: Path) -> None:
    made = model_of(tmp_path, ASKS)
    begun = {"role": "assistant", "content": "<think>\nThey greet"}
    router = planned(made, messages=[*USER, begun]).reader.router
    assert router is not None
    assert router().push(" me").reasoning == "me"
    for text in ("<think>\nx</think> Grüß", "Grüß"):  # the answer itself goes on, and does not think any more
        messages = [*USER, {"role": "assistant", "content": text}]
        found = planned(made, messages=messages, thinking_budget=5)
        assert (found.reader.router, opening(made, found, messages=messages), found.options.thought) == (None, "", None)


def test_which_texts_are_always_the_same_tokens(tmp_path: Path) -> None:
    tokenizer = model_of(tmp_path, HARMONY, CHANNELS).tokenizer
    assert fixed_ids(tokenizer, "<|end|>") == tuple(tokenizer.encode("<|end|>", False))
    assert len(fixed_ids(tokenizer, "<|channel|>final<|message|>") or ()) == 7
    assert fixed_ids(tokenizer, "<|channel|>final") is None
    assert fixed_ids(tokenizer, "</think>") is None


def test_a_schema_in_a_grammar_with_thoughts_is_read_as_strictly(tmp_path: Path) -> None:
    found = planned(model_of(tmp_path, ASKS), **FORMAT).options.grammar
    assert found is not None
    rule = next(line for line in found.source.splitlines() if line.startswith("answer: %json "))
    assert json.loads(rule.removeprefix("answer: %json "))["x-guidance"]["lenient"] is False


@pytest.mark.parametrize("budget", [0, 4])
def test_the_header_of_a_channel_is_no_part_of_its_budget(tmp_path: Path, budget: int) -> None:
    made = model_of(tmp_path, HARMONY, CHANNELS)
    found = planned(made, thinking_budget=budget)
    assert found.options.thought is not None
    assert found.options.thought.force_after == len(ids(made, "<|channel|>analysis<|message|>")) + budget
    forced = "<|end|><|start|>assistant<|channel|>final<|message|>"
    assert made.tokenizer.decode(found.options.thought.forced_ids, False) == forced


def test_a_grammar_among_the_options_holds_behind_the_thought_too(tmp_path: Path) -> None:
    made = model_of(tmp_path, OPENS)
    asked = planned(made, **FORMAT).options
    given = {"type": "json_schema", "value": {"schema": SCHEMA}}
    for grammar in (given, GrammarSpec("json_schema", json.dumps(SCHEMA))):
        found = planned(made, options=Options(grammar=grammar, max_new_tokens=9)).options
        assert found.grammar is not None
        assert (found.grammar.after, found.grammar_field, found.max_new_tokens) == (asked.grammar.after, "grammar", 9)
        assert follows(made, found.grammar, 'Hm</think>{"a": 5}')
        assert not follows(made, found.grammar, 'Hm</think>{"b": 5}')


def test_what_a_model_cannot_do_is_refused(tmp_path: Path) -> None:
    made = model_of(tmp_path, CHAT, (), grammars=False)
    for fields in (FORMAT, {"guided_choice": ["a"]}, {"options": Options(grammar=GrammarSpec("regex", "a"))}):
        with pytest.raises(GrammarError, match="grammar is not supported") as caught:
            planned(made, **fields)
        assert caught.value.param in ("grammar", *fields)
    made.tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="template not found"):
        planned(made)


def test_a_chat_without_thoughts_and_calls_is_read_as_plain_text(tmp_path: Path) -> None:
    made = model_of(tmp_path, ASKS + CALLS)
    tool = {"type": "function", "function": {"name": "f"}}
    silent = {"chat_template_kwargs": {"enable_thinking": False}}
    assert planned(made, **silent).reader is PLAIN
    assert planned(made, **silent, tools=[tool], tool_choice="none").reader is PLAIN
    assert not planned(made, **silent, tools=[tool]).reader.thinks
    assert planned(made).reader.thinks


def test_messages_and_fields_are_not_changed(tmp_path: Path) -> None:
    made = model_of(tmp_path, ASKS + CALLS)
    asked = chat_of(
        messages=[{"role": "developer", "content": "Be"}, *USER,
                  {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                  {"role": "function", "name": "f", "content": "1"}],
        functions=[{"name": "f", "arguments": {"type": "object"}}], tool_prompt="Call.", thinking_budget=3, **FORMAT,
    )  # fmt: skip
    before = deepcopy(asked)
    plan(asked, made)
    assert asked == before
