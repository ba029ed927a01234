"""Reasoning before the answer: separated in streams and plain answers, counted, limited, and free of grammars."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support_chat import ASKS, CHANNELS, HARMONY, MARKS, OPENS, USER
from support_server import Server, scripted

THOUGHT, ANSWER = "They greet me, so…", "Grüß Gott!"


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


def test_stop_strings_of_a_vertex_chat_do_not_end_its_thought(server: Server) -> None:
    def prediction(**fields: Any) -> tuple[str, str]:
        response = server.post("/vertex", {"instances": [{"messages": USER, **fields}]})
        assert response.status_code == 200, response.text
        return response.json()["predictions"][0], response.headers["x-generated-tokens"]

    whole, size = prediction()
    assert whole == f"\n{THOUGHT}\n\n\n{ANSWER}"  # special tokens are left out
    for stop in ("greet", ["y", "\n", "so"]):
        assert prediction(stop=stop) == (whole, size)
    for fields, text in (({"stop": "Gott"}, "Grüß Gott"), ({"stop": ["Gott", "ß"]}, "Grüß"),
                         ({"stop": ["ß"], "min_tokens": 1}, "Grüß"), ({"stop": ["ß"], "min_tokens": 20}, ANSWER)):
        assert prediction(**fields)[0] == whole.removesuffix(ANSWER) + text, fields
    assert int(prediction(stop="Gott")[1]) < int(size)


def test_chat_tokenize_shows_the_prompt_that_is_generated_from(server: Server) -> None:
    def templated(**fields: Any) -> Any:
        return server.post("/chat_tokenize", {"messages": USER, **fields}).json().get("templated_text")

    assert templated(thinking_budget=5) == templated() + "<think>\n"
    assert templated(thinking_budget=0) == templated() + "<think>\n\n</think>\n\n"
    assert templated(thinking_budget=-1) is None
    assert templated(response_format={"type": "x"}) is None
    body = chat(server, thinking_budget=5, max_tokens=1)
    asked = {"messages": USER, "thinking_budget": 5}
    assert body["usage"]["prompt_tokens"] == len(server.post("/chat_tokenize", asked).json()["tokenize_response"])


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
