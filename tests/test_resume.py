"""Streams that tell their token ids, and answers that go on behind given tokens, at a real server."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support_server import TEXT, Server, scripted

from tokenmill.server.protocol import MAX_HEAD_BYTES
from tokenmill.server.resume import MAX_RESUMED, encode_ids


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with scripted(tmp_path_factory.mktemp("model")) as running:
        yield running


def stream(server: Server, path: str, body: Any, resumed: list[int] | None = None, marks: bool = True) -> list[str]:
    """Return the events, each with its marks, of an answer that begins with the tokens `resumed`."""
    headers = {"x-tokenmill-token-ids": "1"} if marks else {}
    if resumed is not None:
        headers["x-tokenmill-resume"] = encode_ids(resumed).decode()
    with httpx.stream("POST", server.url + path, json=body, headers=headers, timeout=30) as response:
        assert response.status_code == 200, response.read()
        return [one for one in "".join(response.iter_text()).split("\n\n") if one]


def ids_of(event: str) -> list[int]:
    mark = re.match(r"id: ([\d,]+)\n", event)
    return [int(word) for word in mark[1].split(",")] if mark else []


def constant(event: str) -> str:
    """Return an event without what differs between two answers to the same request."""
    return re.sub(r'"id":"[^"]*"|"created":\d+|"cached_tokens":\d+', "", event)


NATIVE = {"inputs": "Hello", "parameters": {"max_new_tokens": 70, "details": True}}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 70,
        "stream_options": {"include_usage": True}}  # fmt: skip
REQUESTS = {
    "native": ("/generate_stream", NATIVE),
    "stop": ("/generate_stream", {"inputs": "x", "parameters": {"stop": ["Viktor"]}}),
    "compat": ("/", {**NATIVE, "stream": True}),
    "chat": ("/v1/chat/completions", CHAT),
    "logprobs": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
    "completion": ("/v1/completions", {"prompt": "Hello", "stream": True, "max_tokens": 70}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_an_answer_goes_on_behind_its_first_tokens_as_if_it_had_not_been_cut(server: Server, name: str) -> None:
    path, body = REQUESTS[name]
    whole = stream(server, path, body)
    marked = [ids_of(event) for event in whole]
    ids = [token_id for some in marked for token_id in some]
    assert [re.sub(r"^id: .*\n", "", constant(one)) for one in whole] == [
        constant(one) for one in stream(server, path, body, marks=False)
    ]
    for cut in sorted({1, 2, len(ids) // 2, len(ids) - 1, len(ids)}):  # "Zwölf": after 3 bytes a letter is incomplete
        again = stream(server, path, body, ids[:cut])
        given = 0
        for first, second in zip(whole, again, strict=True):
            given += len(ids_of(first))
            if given > cut or "logprob" not in first:  # tokens that were given have no details
                assert constant(first) == constant(second)
        assert [ids_of(event) for event in again] == marked


def test_a_whole_answer_goes_on_too(server: Server) -> None:
    ids = [id for event in stream(server, *REQUESTS["native"]) for id in ids_of(event)]
    headers = {"x-tokenmill-resume": encode_ids(ids[:9]).decode()}
    whole = server.post("/generate", NATIVE, headers=headers).json()
    assert whole["generated_text"].startswith(TEXT)
    assert whole["details"]["generated_tokens"] == len(TEXT.encode()) + 1
    assert [token["id"] for token in whole["details"]["tokens"]] == ids


@pytest.mark.parametrize("value", ["%%%", "AA==", base64.b64encode(b"\xff\xff\xff").decode()])
def test_wrong_ids_are_refused(server: Server, value: str) -> None:
    answer = server.post("/generate_stream", NATIVE, headers={"x-tokenmill-resume": value})
    assert answer.status_code == 422
    assert "x-tokenmill-resume" in answer.json()["error"]


def test_an_answer_of_several_sequences_cannot_be_resumed(server: Server) -> None:
    headers = {"x-tokenmill-resume": encode_ids([5]).decode()}
    for body in ({"prompt": ["a", "b"]}, {"prompt": "a", "n": 2}):
        answer = server.post("/v1/completions", {**body, "max_tokens": 3, "stream": True}, headers=headers)
        assert answer.status_code == 400
        assert "2 sequences cannot be resumed" in json.dumps(answer.json())


def test_the_longest_answer_that_is_resumed_fits_into_a_head() -> None:
    assert len(encode_ids([0xFFFFFF] * MAX_RESUMED)) < MAX_HEAD_BYTES - 8192
