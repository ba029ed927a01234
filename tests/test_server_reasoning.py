"""Thoughts before the answer: told apart in streams and plain answers, counted, bounded, and free of grammars."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support_grammar import made as compiled
from support_server import Server, byte_model, scripted

from tokenmill.errors import Unsupported, ValidationError
from tokenmill.grammar.base import Vocabulary
from tokenmill.grammar.llguidance import LLGuidance
from tokenmill.server.routes.chat_grammar import Voice, fixed_ids
from tokenmill.server.routes.chat_speech import Speech, check_parsers, speech_of
from tokenmill.server.routes.chat_tools import tools_of
from tokenmill.server.schema.openai import ChatRequest
from tokenmill.text.guided import openai_grammar
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import GrammarSpec

USER = [{"role": "user", "content": "hi"}]
CHAT = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
ASKS = (  # as Qwen 3: the model thinks unless it is told not to
    CHAT + "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENS = CHAT + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}{# </think> #}"
HARMONY = CHAT + "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|> <|message|> #}"
MARKS = ("<think>", "</think>")
CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")
THOUGHT, ANSWER = "They greet me, so…", "Grüß Gott!"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    said = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
    with scripted(tmp_path_factory.mktemp("model"), text=said, template=ASKS, special=MARKS) as running:
        yield running


def chat(server: Server, **fields: Any) -> Any:
    response = server.post("/v1/chat/completions", {"messages": USER, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_thought_is_told_apart_under_both_names(server: Server) -> None:
    body = chat(server)
    assert body["choices"][0]["message"] == {
        "role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT, "reasoning": THOUGHT,
    }  # fmt: skip
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = body["usage"]
    thought = usage["completion_tokens_details"]["reasoning_tokens"]
    assert len(THOUGHT.encode()) <= thought <= len(f"<think>\n{THOUGHT}\n") + len(THOUGHT.encode()) - len(THOUGHT)
    assert usage["completion_tokens"] > thought + len(ANSWER.encode())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 10},
        {"max_tokens": 21},
        {"stop": "Gott"},
        {"stop": "greet"},
        {"stop": ["ß"], "min_tokens": 12},
    ],
)
def test_the_plain_answer_is_the_fold_of_the_stream(server: Server, fields: Any) -> None:
    plain = chat(server, **fields)
    message = plain["choices"][0]["message"]
    asked = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}, **fields}
    *chunks, usage, _ = server.events("/v1/chat/completions", asked)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta["content"] for delta in deltas) == message["content"]  # in every chunk
    for name in ("reasoning_content", "reasoning"):
        assert "".join(delta.get(name, "") for delta in deltas) == message.get(name, "")
    assert all(delta["content"] or delta.get("reasoning") for delta in deltas[1:-1])
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert usage["usage"]["completion_tokens_details"] == plain["usage"]["completion_tokens_details"]
    assert chunks[-1]["choices"][0]["finish_reason"] == plain["choices"][0]["finish_reason"]


def test_stop_strings_and_the_least_number_of_tokens_are_about_the_answer(server: Server) -> None:
    for stop in ("greet", ["y", "\n", "so"]):
        message = chat(server, stop=stop)["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == (THOUGHT, ANSWER)
    for stop, content in (("Gott", "Grüß "), (["Gott", "ß"], "Grü"), ("!", "Grüß Gott")):
        choice = chat(server, stop=stop)["choices"][0]
        assert (choice["message"]["reasoning"], choice["message"]["content"]) == (THOUGHT, content)
        assert choice["finish_reason"] == "stop"
    for least, content in ((1, "Grü"), (20, ANSWER)):
        assert chat(server, stop=["ß"], min_tokens=least)["choices"][0]["message"]["content"] == content
    kept = chat(server, stop="Gott", include_stop_str_in_output=True)["choices"][0]["message"]
    assert (kept["reasoning"], kept["content"]) == (THOUGHT, "Grüß Gott")


def test_where_the_prompt_says_not_to_think_marks_are_content(server: Server) -> None:
    body = chat(server, chat_template_kwargs={"enable_thinking": False})
    assert set(body["choices"][0]["message"]) == {"role", "content"}
    assert "completion_tokens_details" not in body["usage"]


def test_effort_turns_thinking_off_where_the_template_has_a_switch(server: Server) -> None:
    def templated(**fields: Any) -> str:
        return str(server.post("/chat_tokenize", {"messages": USER, **fields}).json()["templated_text"])

    assert templated(reasoning_effort="none").endswith("</think>\n\n")
    assert templated(reasoning_effort="high") == templated()


@pytest.mark.parametrize("template, marks, said", [
    (OPENS, MARKS, f"{THOUGHT}\n</think>\n\n{ANSWER}"),
    (HARMONY, CHANNELS, f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>"
     + ANSWER),
])  # fmt: skip
def test_other_forms_of_thoughts(tmp_path: Path, template: str, marks: tuple[str, ...], said: str) -> None:
    with scripted(tmp_path, text=said, template=template, special=marks) as running:
        message = chat(running)["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == (ANSWER, THOUGHT)


def test_no_parser_leaves_thoughts_in_the_content(tmp_path: Path) -> None:
    with scripted(tmp_path, "--reasoning-parser", "none", text=f"<think>{THOUGHT}</think>{ANSWER}",
                  template=ASKS) as running:  # fmt: skip
        assert chat(running)["choices"][0]["message"]["content"] == f"<think>{THOUGHT}</think>{ANSWER}"


def test_parsers_must_exist() -> None:
    check_parsers("hermes", "none")
    check_parsers("", "deepseek_r1")
    for names in (("morse", ""), ("", "morse")):
        with pytest.raises(Unsupported, match="morse"):
            check_parsers(*names)


# --- what the engine is asked for ------------------------------------------------------------------------------------


def voice(folder: Path, template: str, special: tuple[str, ...] = MARKS, reasoning_parser: str = "") -> Voice:
    tokenizer = Tokenizer.load(local_source(byte_model(folder, template, special)))
    return Voice(tokenizer, template, "", reasoning_parser)


def speech(made: Voice, **fields: Any) -> Speech:
    body = msgspec.convert({"messages": USER, **fields}, ChatRequest)
    chat_template = made.tokenizer.chat_template
    assert chat_template is not None
    prompt = chat_template.render(body.messages, kwargs=body.chat_template_kwargs or {})
    return speech_of(made, body, prompt, tools_of(body), openai_grammar(fields))


def ids(made: Voice, text: str) -> tuple[int, ...]:
    return tuple(made.tokenizer.encode(text, False))


def follows(made: Voice, grammar: GrammarSpec, text: str) -> bool:
    """Whether a text is a whole answer under a grammar. Where that begins behind some token, the text has one."""
    tokenizer = made.tokenizer
    size = tokenizer.vocab_size
    vocabulary = Vocabulary.of(tokenizer.token_bytes, size, size, tokenizer.eos_ids, sorted(tokenizer.special_ids))
    matcher = compiled(LLGuidance(vocabulary), grammar.kind, grammar.source).matcher()
    begun = text
    for (after,) in grammar.after:
        begun = text.partition(tokenizer.decode([after], False))[2]
        assert begun != text
    return all(matcher.accept(i) for i in (*ids(made, begun), tokenizer.eos_ids[0]))


def test_a_grammar_begins_behind_a_thought_that_the_prompt_has_opened(tmp_path: Path) -> None:
    made = voice(tmp_path, OPENS)
    found = speech(made, **FORMAT)
    assert found.grammar is not None
    assert (found.grammar.kind, found.grammar.after, found.opening) == ("json_schema", (ids(made, "</think>"),), "")
    assert found.grammar_field == "response_format"


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
    made = voice(tmp_path, ASKS, special)
    found = speech(made, **fields)
    assert found.grammar is not None
    assert not found.grammar.after
    for before in ("", '<think>\nWell, {"b": maybe\n</think>\n\n', "<think>\n</think>"):
        assert follows(made, found.grammar, before + good), before
        assert not follows(made, found.grammar, before + bad), before
    assert not follows(made, found.grammar, "Well, " + good)
    assert not follows(made, found.grammar, "<think>" + good)


@pytest.mark.parametrize(("fields", "good", "bad"), WANTED)
def test_a_model_of_channels_answers_in_its_final_one(
    tmp_path: Path, fields: dict[str, Any], good: str, bad: str
) -> None:
    made = voice(tmp_path, HARMONY, CHANNELS)
    found = speech(made, **fields)
    assert found.grammar is not None
    final = "<|channel|>final<|message|>"
    for before in (final, f"<|channel|>analysis<|message|>Well…<|end|><|start|>assistant{final}"):
        assert follows(made, found.grammar, before + good), before
        assert not follows(made, found.grammar, before + bad), before
    assert not follows(made, found.grammar, good)


def test_a_forced_call_comes_behind_the_thought_too(tmp_path: Path) -> None:
    template = ASKS + "{# {{ tools }} <tool_call> #}"
    made = voice(tmp_path, template, (*MARKS, "<tool_call>", "</tool_call>"))
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    found = speech(made, tools=[tool], tool_choice="required")
    assert found.grammar is not None
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert follows(made, found.grammar, call)
    assert follows(made, found.grammar, f"<think>\nf?\n</think>\n\n{call}")
    assert not follows(made, found.grammar, call.replace("1", '"1"'))
    assert not follows(made, found.grammar, "Hello")
    assert speech(made, tools=[tool]).grammar is None


CALLS = "{# {{ tools }} <tool_call> #}"
TAGS = ("<tool_call>", "</tool_call>")
STRICT = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize("special", [(*MARKS, *TAGS), MARKS, ()])
def test_a_strict_call_is_held_to_behind_thoughts_and_text(tmp_path: Path, special: tuple[str, ...]) -> None:
    made = voice(tmp_path, ASKS + CALLS, special)
    found = speech(made, tools=[STRICT])
    assert found.grammar is not None
    assert found.grammar.after == ((ids(made, "<tool_call>"),) if TAGS[0] in special else ())
    assert found.grammar_field == "tools"
    bad = CALL.replace("1", '"1"')
    for text in (f"Well. {CALL} And {CALL}\nDone.", f"<think>\nf?\n</think>\n\n{CALL}", CALL):
        assert follows(made, found.grammar, text), text
        assert not follows(made, found.grammar, text.replace(CALL, bad)), text
    if TAGS[0] not in special:  # else it waits for a call and has no say in the end before
        for text in ("", "Hello", "<think>\nf?\n</think>\n\nNo <tool_cal"):
            assert follows(made, found.grammar, text), text


def test_a_strict_call_is_held_to_behind_a_thought_that_the_prompt_has_opened(tmp_path: Path) -> None:
    made = voice(tmp_path, OPENS + CALLS)
    found = speech(made, tools=[STRICT])
    assert found.grammar is not None
    assert found.grammar.after == (ids(made, "</think>"),)
    text = f"<tool_call> or not?\n</think>\n\nYes: {CALL}"
    assert follows(made, found.grammar, text)
    assert not follows(made, found.grammar, text.replace("1", "x"))


def test_a_strict_call_of_a_model_of_channels(tmp_path: Path) -> None:
    made = voice(tmp_path, HARMONY, CHANNELS)
    found = speech(made, tools=[STRICT])
    assert found.grammar is not None
    thought = "<|channel|>analysis<|message|>to=functions.f?<|end|><|start|>assistant"
    call = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
    preamble = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    for text in (thought + call, thought + preamble + call, call):
        assert follows(made, found.grammar, text), text
        assert not follows(made, found.grammar, text.replace("1", "x")), text
    assert follows(made, found.grammar, f"{thought}<|channel|>final<|message|>Hello")
    assert not follows(made, found.grammar, "Hello")
    forced = speech(made, tools=[STRICT], tool_choice="required", thinking_budget=5)
    assert forced.grammar is not None
    assert forced.thought is not None
    assert follows(made, forced.grammar, thought + call)
    assert not follows(made, forced.grammar, f"{thought}<|channel|>final<|message|>Hello")
    assert made.tokenizer.decode(forced.thought.forced_ids, False) == "<|end|><|start|>assistant"  # and then a call


def test_a_thought_that_was_asked_for_is_opened(tmp_path: Path) -> None:
    made = voice(tmp_path, ASKS)
    found = speech(made, **FORMAT, chat_template_kwargs={"enable_thinking": True})
    assert found.grammar is not None
    assert (found.opening, found.grammar.after) == ("<think>\n", (ids(made, "</think>"),))
    found = speech(made, **FORMAT, chat_template_kwargs={"enable_thinking": False})
    assert found.grammar is not None
    assert (found.opening, found.grammar.after, found.router) == ("", (), None)


def test_a_budget_ends_the_thought(tmp_path: Path) -> None:
    made = voice(tmp_path, OPENS)
    end = ids(made, "</think>")
    found = speech(made, thinking_budget=7)
    assert found.thought is not None
    assert (found.thought.force_after, found.thought.unless) == (7, (end,))
    assert made.tokenizer.decode(found.thought.forced_ids, False) == "\n</think>\n\n"
    behind = speech(made, thinking_budget=7, **FORMAT).thought  # a grammar begins at once
    assert behind is not None
    assert made.tokenizer.decode(behind.forced_ids, False) == "\n</think>"
    none = speech(made, thinking_budget=0)
    assert (none.thought, none.opening, none.router) == (None, "\n</think>\n\n", None)


def test_a_budget_needs_a_thought_whose_end_is_a_token(tmp_path: Path) -> None:
    for number, (template, special) in enumerate([(CHAT, MARKS), (OPENS, ())]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ValidationError) as caught:
            speech(voice(folder, template, special), thinking_budget=7)
        assert caught.value.param == "thinking_budget"


def test_a_thought_whose_end_is_no_token_is_closed_before_a_grammar(tmp_path: Path) -> None:
    made = voice(tmp_path, OPENS, ())
    found = speech(made, **FORMAT)
    assert found.grammar is not None
    assert (found.opening, found.grammar.after, found.router) == ("\n</think>\n\n", (), None)


def test_the_thought_of_a_message_that_is_continued_goes_on(tmp_path: Path) -> None:
    made = voice(tmp_path, ASKS)
    begun = {"role": "assistant", "content": "<think>\nThey greet"}
    router = speech(made, messages=[*USER, begun]).router
    assert router is not None
    assert router().push(" me").reasoning == "me"
    for text in ("<think>\nx</think> Grüß", "Grüß"):  # the answer itself goes on, and does not think any more
        found = speech(made, messages=[*USER, {"role": "assistant", "content": text}], thinking_budget=5)
        assert (found.router, found.opening, found.thought) == (None, "", None)


def test_which_texts_are_always_the_same_tokens(tmp_path: Path) -> None:
    tokenizer = voice(tmp_path, HARMONY, CHANNELS).tokenizer
    assert fixed_ids(tokenizer, "<|end|>") == tuple(tokenizer.encode("<|end|>", False))
    assert len(fixed_ids(tokenizer, "<|channel|>final<|message|>") or ()) == 7
    assert fixed_ids(tokenizer, "<|channel|>final") is None
    assert fixed_ids(tokenizer, "</think>") is None


def test_a_schema_in_a_grammar_with_thoughts_is_read_as_strictly(tmp_path: Path) -> None:
    found = speech(voice(tmp_path, ASKS), **FORMAT).grammar
    assert found is not None
    rule = next(line for line in found.source.splitlines() if line.startswith("answer: %json "))
    assert json.loads(rule.removeprefix("answer: %json "))["x-guidance"]["lenient"] is False


@pytest.mark.parametrize("budget", [0, 4])
def test_the_header_of_a_channel_is_no_part_of_its_budget(tmp_path: Path, budget: int) -> None:
    made = voice(tmp_path, HARMONY, CHANNELS)
    found = speech(made, thinking_budget=budget)
    assert found.thought is not None
    assert found.thought.force_after == len(ids(made, "<|channel|>analysis<|message|>")) + budget
    forced = "<|end|><|start|>assistant<|channel|>final<|message|>"
    assert made.tokenizer.decode(found.thought.forced_ids, False) == forced
