"""Reasoning end to end: a tiny random model reasons until its budget is spent, through a server and its engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support_chat import ASKS, MARKS, USER
from support_models import make_checkpoint
from support_ports import unused_port
from support_server import Server, byte_model

VOCABULARY = 264  # two end tokens, bytes, two marks, and unused ids
OPENED = {"chat_template_kwargs": {"opened": True}}  # the template begins the reasoning
SHAPE = {"type": "object", "properties": {"a": {"enum": ["x", "yz"]}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SHAPE}}}
STRICT = {"type": "function", "function": {"name": "f", "parameters": SHAPE, "strict": True}}
TEXT_ALONE = {str(i): -100.0 for i in (0, *range(258, VOCABULARY))}
"""A bias by which the end, the marks and ids without a meaning come only where they are forced."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model")
    byte_model(folder, ASKS + "{% if opened %}<think>\n{% endif %}{# {{ tools }} <tool_call> #}", MARKS)
    make_checkpoint(folder, vocab_size=VOCABULARY, eos_token_id=0, bos_token_id=1, max_position_embeddings=512)
    running = Server(folder, unused_port(), mock=False)
    yield running
    running.stop()


def asked(**fields: Any) -> dict[str, Any]:
    return {"messages": USER, "seed": 3, "max_tokens": 60, "logit_bias": TEXT_ALONE, "logprobs": True, **fields}


def chat(server: Server, **fields: Any) -> tuple[dict[str, Any], list[str], int]:
    """Return the message, its tokens, and the number of reasoning tokens."""
    response = server.post("/v1/chat/completions", asked(**fields))
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    usage = response.json()["usage"]
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert usage["completion_tokens"] == len(tokens)
    return choice["message"], tokens, usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)


@pytest.mark.parametrize("opened", [{}, OPENED])
@pytest.mark.parametrize("budget", [1, 2, 13])
def test_the_thought_ends_at_its_budget_and_content_follows(server: Server, budget: int, opened: Any) -> None:
    message, tokens, num_reasoning = chat(server, thinking_budget=budget, **opened)
    assert tokens[budget : budget + 4] == ["\n", "</think>", "\n", "\n"]
    assert "</think>" not in tokens[:budget] + tokens[budget + 4 :]
    assert len(tokens) == 60
    assert num_reasoning == budget + 1  # the line's end before the mark is one of its tokens
    assert len(message["content"]) > 20
    assert "think>" not in message["content"] + message.get("reasoning_content", "")


@pytest.mark.parametrize("fields", [
    {"thinking_budget": 7}, {"thinking_budget": 7, **OPENED}, {"thinking_budget": 0}, {"thinking_budget": 100},
    {"thinking_budget": 5, **FORMAT}, {"thinking_budget": 5, "tools": [STRICT], "tool_choice": "required"},
    {"thinking_budget": 9, "stop": "a"}, {**OPENED, **FORMAT, "logit_bias": {"259": 100}},
])  # fmt: skip
def test_the_plain_answer_is_the_fold_of_the_stream(server: Server, fields: dict[str, Any]) -> None:
    message, tokens, num_reasoning = chat(server, **fields)
    streamed = asked(stream=True, stream_options={"include_usage": True}, **fields)
    *chunks, usage, done = server.events("/v1/chat/completions", streamed)
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    for name in ("content", "reasoning_content"):
        assert "".join(choice["delta"].get(name, "") for choice in choices) == (message.get(name) or "")
    pieces = [call["function"] for choice in choices for call in choice["delta"].get("tool_calls", ())]
    arguments = [call["function"]["arguments"] for call in message.get("tool_calls", ())]
    assert "".join(piece["arguments"] for piece in pieces) == "".join(arguments)
    assert [entry["token"] for choice in choices for entry in choice["logprobs"]["content"]] == tokens
    assert usage["usage"].get("completion_tokens_details", {}).get("reasoning_tokens", 0) == num_reasoning


@pytest.mark.parametrize("opened", [{}, OPENED])
@pytest.mark.parametrize("budget", [0, 1, 6])
def test_a_grammar_holds_behind_a_thought_of_any_budget(server: Server, budget: int, opened: Any) -> None:
    for seed in range(3):
        message, _, num_reasoning = chat(server, thinking_budget=budget, seed=seed, **FORMAT, **opened)
        assert json.loads(message["content"])["a"] in ("x", "yz")
        assert num_reasoning == (budget + 1 if budget else 0)
        assert ("reasoning_content" in message) <= bool(budget)


def test_a_call_that_must_come_comes_behind_the_thought(server: Server) -> None:
    message, tokens, num_reasoning = chat(server, thinking_budget=4, tools=[STRICT], tool_choice="required")
    assert tokens[4:6] == ["\n", "</think>"]
    (call,) = message["tool_calls"][:1]
    assert json.loads(call["function"]["arguments"])["a"] in ("x", "yz")
    assert (message["content"], num_reasoning) == (None, 5)


def test_without_a_thought_there_is_none_and_no_mark(server: Server) -> None:
    message, tokens, num_reasoning = chat(server, thinking_budget=0)
    assert "reasoning_content" not in message
    assert (num_reasoning, len(tokens)) == (0, 60)
    assert "</think>" not in tokens  # it was closed in the prompt: 0 is not "never"


def test_a_thought_that_ends_by_itself_is_not_ended_again(server: Server) -> None:
    message, tokens, num_reasoning = chat(server, thinking_budget=3, logit_bias={"259": 100.0}, max_tokens=8, **OPENED)
    assert tokens[0] == "</think>"
    assert "\n" not in tokens[:4]  # the model says nothing else; its budget is spent, and nothing is forced
    assert num_reasoning == 0
    assert "reasoning_content" not in message
