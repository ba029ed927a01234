"""From sequences to answers: permits of calls, long answers, refusals under load."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support_server import Server, eventually, scripted

USER = [{"role": "user", "content": "hi"}]
LONG = {"messages": USER, "ignore_eos": True, "max_tokens": 440}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = ("--max-concurrent-requests", "6", "--max-client-batch-size", "8")
    with scripted(tmp_path_factory.mktemp("model"), *limits) as running:
        yield running


def in_flight(server: Server) -> float:
    return server.metric("tokenmill_requests_in_flight")


def test_a_long_answer_is_what_its_stream_said(server: Server) -> None:
    asked = {**LONG, "n": 3, "logprobs": True, "top_logprobs": 2}
    plain = server.post("/v1/chat/completions", asked).json()["choices"]
    *chunks, _ = server.events("/v1/chat/completions", {**asked, "stream": True})
    for choice in plain:
        its = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert len(its) == 440
        assert "".join(c["delta"]["content"] for c in its) == choice["message"]["content"]
        assert [entry for c in its for entry in c["logprobs"]["content"]] == choice["logprobs"]["content"]


def test_each_sequence_takes_a_place_and_gives_it_back(server: Server) -> None:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(server.post("/v1/chat/completions", {**LONG, "n": 5})))
    thread.start()
    eventually(lambda: in_flight(server) == 5)
    busy = server.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1})
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    assert busy.json()["error"]["type"] == "rate_limit_error"
    assert busy.json()["error_type"] == "overloaded"
    one = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert one.status_code == 200
    thread.join(20)
    assert answers[0].status_code == 200
    eventually(lambda: in_flight(server) == 0)


def test_refused_calls_keep_no_place(server: Server) -> None:
    for fields in ({"top_p": 2}, {"messages": [{"role": "user", "content": "x" * 600}]}, {"logit_bias": {"9999": 1}}):
        assert server.post("/v1/chat/completions", {"messages": USER, **fields}).status_code == 400
    assert in_flight(server) == 0


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/v1/chat/completions", {"messages": USER, "n": 7}, "n"),
        ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 3}, "n"),
    ],
)
def test_more_sequences_than_places_can_never_be_served(
    server: Server, path: str, body: dict[str, Any], param: str
) -> None:
    answer = server.post(path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_more_prompts_than_places_are_refused_too(server: Server) -> None:
    answer = server.post("/v1/completions", {"prompt": list("abcdefg"), "max_tokens": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
