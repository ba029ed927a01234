"""Every field of OpenAI's routes: any value works or is refused by the field's name; bounds at the limit and beyond."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from support_server import Server, scripted

from tokenmill.errors import ValidationError
from tokenmill.server.schema.openai import ChatRequest, CompletionRequest, SamplingFields
from tokenmill.text.chat_request import Chat, template_fields
from tokenmill.text.limits import LOGPROBS, OPENAI_TABLE, TABLE, Limit
from tokenmill.text.options import RequestLimits

SERVER = RequestLimits(499, 500, max_stop_sequences=4, max_best_of=2, max_top_n_tokens=5, vocab_size=258)
GENEROUS = msgspec.structs.replace(SERVER, max_top_n_tokens=50)
VALUES: list[Any] = ["x", "", "é" * 3000, 3, -1, 0, 2.5, 10**30, -(10**30), 1e308, True, [], [1], ["x"], {}, {"a": 1}]
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
COMPLETION = {"prompt": "hi", "max_tokens": 1}
COMMON = set(SamplingFields.__struct_fields__)
FIELDS = [("/v1/chat/completions", CHAT, name) for name in ChatRequest.__struct_fields__]
FIELDS += [("/v1/completions", COMPLETION, name) for name in CompletionRequest.__struct_fields__ if name not in COMMON]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with scripted(tmp_path_factory.mktemp("model")) as running:
        yield running


@pytest.mark.parametrize("path, base, name", FIELDS, ids=lambda value: value if isinstance(value, str) else "")
def test_any_value_works_or_is_refused_by_name_and_quickly(
    server: Server, path: str, base: dict[str, Any], name: str
) -> None:
    slowest, refused = 0.0, 0
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for value in VALUES:
            begin = time.perf_counter()
            response = client.post(path, json={**base, name: value})
            took = time.perf_counter() - begin
            if response.status_code == 200:
                continue
            refused, slowest = refused + 1, max(slowest, took)
            assert response.status_code == 400, (value, response.text)
            answer = response.json()
            assert (answer["error"]["param"] or "").startswith(name), (value, answer)
            assert answer["error"]["type"] == "invalid_request_error"
            assert len(answer["error"]["message"]) < 500
        if name not in ("messages", "prompt"):
            assert client.post(path, json={**base, name: None}).status_code == 200
    assert refused >= 6
    assert slowest < 2  # 0.05 on an idle machine; the margin is for other load and garbage collection


def of_size(limit: Limit, size: int) -> Any:
    """Return a value of the field that measures `size`."""
    if limit.name == "metadata":
        by_unit = {"pairs": {str(i): "" for i in range(size)}, "characters in each key": {"k" * size: "v"}}
        return by_unit.get(limit.unit, {"k": "v" * size})
    if limit.name == "logit_bias":
        return {str(i): 1.0 for i in range(size)}
    if limit.unit == "bytes of JSON":
        return "a" * (size - len('""'))
    return "a" * size if limit.measure is len else size


@pytest.mark.parametrize("limit", [*OPENAI_TABLE, LOGPROBS], ids=lambda limit: f"{limit.name}-{limit.unit}")
def test_a_bound_of_openais_holds_at_the_limit_and_not_beyond(limit: Limit) -> None:
    least, most = (int(bound) for bound in limit.bounds(SERVER, "openai"))
    for inside in (least, most):
        limit.check(of_size(limit, inside), SERVER, "openai")
    for outside in (least - 1, most + 1):
        if outside < 0 and limit.unit:
            continue  # no value is shorter than an empty one
        with pytest.raises(ValidationError, match=f"Invalid '{limit.name}'.* Given: {outside}") as caught:
            limit.check(of_size(limit, outside), SERVER, "openai")
        assert caught.value.param == limit.name


def test_the_effort_of_reasoning_reaches_a_template_that_knows_it() -> None:
    chat = Chat(messages=[], reasoning_effort="low")
    assert template_fields(chat, "{{ reasoning_effort }}") == {"reasoning_effort": "low"}
    with pytest.raises(ValidationError, match="`reasoning_effort` is not supported"):
        template_fields(chat, "{{ messages }}")
    assert template_fields(Chat(messages=[]), "") == {}


def test_openais_own_numbers_hold_unless_the_server_allows_more() -> None:
    top = next(limit for limit in TABLE if limit.name == "top_n_tokens")
    assert [top.bounds(server, "openai")[1] for server in (SERVER, GENEROUS)] == [20, 50]
    assert [top.bounds(server, "native")[1] for server in (SERVER, GENEROUS)] == [5, 50]
    assert [LOGPROBS.bounds(server, "openai")[1] for server in (SERVER, GENEROUS)] == [5, 50]


@pytest.mark.parametrize("name", ["messages", "prompt"])
def test_what_is_needed_is_named_if_it_is_missing(server: Server, name: str) -> None:
    path = "/v1/chat/completions" if name == "messages" else "/v1/completions"
    response = server.post(path, {"model": "tgi"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)
