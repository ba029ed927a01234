"""Every bound on a request's fields, at the limit and one beyond; wrong types for every field of the native API."""

from __future__ import annotations

import time
from collections.abc import Iterator
from math import inf, nan, nextafter
from typing import Any

import httpx
import msgspec
import pytest
from support_server import Server, scripted

from tokenmill.errors import ValidationError
from tokenmill.server.openapi import document
from tokenmill.server.routes.table import ROUTES
from tokenmill.server.schema.native import GenerateParameters
from tokenmill.text import limits
from tokenmill.text.limits import TABLE, Limit
from tokenmill.text.options import RequestLimits

SERVER = RequestLimits(499, 500, max_stop_sequences=4, max_best_of=2, max_top_n_tokens=5, vocab_size=258)
ALL = [*TABLE, limits.TRUNCATE, limits.BEST_OF, limits.GRAMMAR]


def of_size(limit: Limit, size: float) -> Any:
    """Return a value of the field that measures `size`."""
    if limit.name == "stop":
        return ("a",) * int(size) if limit.measure is len else ("a" * int(size),)
    if limit.unit == "bytes of JSON":
        return "a" * (int(size) - len('""'))
    return "a" * int(size) if limit.measure is len else size


def beyond(limit: Limit, bound: float, way: float) -> float:
    """Return the next value past `bound`, upwards or downwards."""
    whole = limit.name in ("top_k", "max_new_tokens", "min_new_tokens", "seed", "truncate", "best_of")
    if whole or limit.unit or isinstance(limit.most, str) or limit.name == "prompt_logprobs":
        return int(bound) + (1 if way > 0 else -1)
    return nextafter(bound, way)


@pytest.mark.parametrize("dialect", ["native", "openai"])
@pytest.mark.parametrize("limit", ALL, ids=lambda limit: f"{limit.name}-{limit.most}")
def test_a_bound_holds_at_the_limit_and_not_beyond(limit: Limit, dialect: Any) -> None:
    least, most = limit.bounds(SERVER, dialect)
    edges = [(bound, way) for bound, way in ((least, -inf), (most, inf)) if abs(bound) < inf]
    assert edges
    for bound, way in edges:
        if limit.unit and bound == 0:
            continue  # no value is shorter than an empty one
        inside = beyond(limit, bound, inf) if limit.above and way < 0 else bound
        outside = bound if limit.above and way < 0 else beyond(limit, bound, way)
        limit.check(of_size(limit, inside), SERVER, dialect)
        with pytest.raises(ValidationError) as caught:
            limit.check(of_size(limit, outside), SERVER, dialect)
        field = limit.name if dialect == "native" else limits.OPENAI_NAMES.get(limit.name, limit.name)
        assert caught.value.param == field
        assert field in str(caught.value)
        if dialect == "openai" or not limit.native:
            assert "Given: " in str(caught.value)


@pytest.mark.parametrize("limit", [limit for limit in ALL if limit.measure is limits._itself], ids=lambda x: x.name)
@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_what_is_no_number_is_out_of_every_bound(limit: Limit, value: float) -> None:
    with pytest.raises(ValidationError):
        limit.check(value, SERVER, "native")


def test_a_message_repeats_little_of_what_was_given() -> None:
    for value in (10**5000, "x" * 10_000):
        assert len(limits.shown(value)) < 100
    with pytest.raises(ValidationError, match="an integer of 16610 bits"):
        next(limit for limit in TABLE if limit.name == "seed").check(10**5000, SERVER, "native")


def test_bounds_are_documented_where_they_are_checked() -> None:
    shown = document(ROUTES)["components"]["schemas"]["GenerateParameters"]["properties"]
    assert (shown["top_p"]["exclusiveMinimum"], shown["top_p"]["maximum"]) == (0, 1)
    assert shown["seed"]["maximum"] == 2**64 - 1
    for limit in TABLE:
        if limit.name in shown and not limit.unit and not isinstance(limit.most, str):
            assert {"minimum", "maximum", "exclusiveMinimum"} & shown[limit.name].keys(), limit.name


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with scripted(tmp_path_factory.mktemp("model")) as running:
        yield running


FIELDS = {field.name: field for field in msgspec.structs.fields(GenerateParameters)}
VALUES: list[Any] = [True, 0, -1, 7, 2.5, -1e308, 1e308, 10**30, "x", "", [], ["a"], [""], [1], [["a"]], {}, {"a": 1}]


@pytest.mark.parametrize("name", FIELDS)
def test_a_wrong_type_or_value_is_refused_quickly_in_json_and_by_name(server: Server, name: str) -> None:
    slowest = 0.0
    with httpx.Client(base_url=server.url) as client:
        for value in VALUES:
            begin = time.perf_counter()
            response = client.post("/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 1, name: value}})
            took = time.perf_counter() - begin
            assert response.status_code in (200, 422), (value, response.text)
            if response.status_code == 422:
                slowest = max(slowest, took)
                answer = response.json()
                assert list(answer) == ["error", "error_type"]
                assert answer["error_type"] == "validation"
                assert name in answer["error"] or "inputs" in answer["error"], answer
        assert client.post("/generate", json={"inputs": "x", "parameters": {name: None}}).status_code == 200
    assert slowest < 2  # 0.05 on an idle machine; the margin is for other load and garbage collection


EDGES: list[tuple[str, list[Any], list[Any]]] = [
    ("best_of", [0, 1, 2], [3]),
    ("temperature", [0, 1e-9, 2, 100], [-1e-9]),
    ("repetition_penalty", [0.1, 1, 10], [0, -1]),
    ("frequency_penalty", [-2, 0, 2], [-2.001, 2.001]),
    ("presence_penalty", [-2, 0, 2], [-2.001, 2.001]),
    ("top_k", [1, 2**31 - 1], [0, -1, 2**31]),
    ("top_p", [1e-9, 0.999, 1], [0, 1.001]),
    ("typical_p", [1e-9, 0.999, 1], [0, 1.001]),
    ("min_p", [0, 1], [-0.001, 1.001]),
    ("max_new_tokens", [1, 499], [0, 500]),
    ("stop", [[], ["a"], ["a", "b", "c", "d"]], [["a", "b", "c", "d", "e"], [""]]),
    ("truncate", [1, 499], [0, 500]),
    ("seed", [0, 2**64 - 1], [-1, 2**64]),
    ("top_n_tokens", [0, 5], [6]),
]
"""The specification's numbers, with the server's options of this file: the last values allowed, the first refused."""


@pytest.mark.parametrize("name, allowed, refused", EDGES)
def test_the_native_bounds_are_the_specifications(
    server: Server, name: str, allowed: list[Any], refused: list[Any]
) -> None:
    for value in (*allowed, *refused):
        parameters = {"max_new_tokens": 1, "do_sample": name == "best_of" or None, name: value}
        response = server.post("/generate", {"inputs": "x", "parameters": parameters})
        assert response.status_code == (422 if value in refused else 200), (value, response.text)


@pytest.mark.parametrize(
    "path, good",
    [
        ("/generate", {"inputs": "x"}),
        ("/generate_stream", {"inputs": "x"}),
        ("/", {"inputs": "x"}),
        ("/tokenize", {"inputs": "x"}),
        ("/chat_tokenize", {"messages": [{"role": "user", "content": "x"}]}),
        ("/vertex", {"instances": [{"inputs": "x"}]}),
        ("/invocations", {"inputs": "x"}),
    ],
)
def test_every_native_route_refuses_a_body_that_is_not_its_own(server: Server, path: str, good: dict[str, Any]) -> None:
    assert server.post(path, good).status_code == 200
    (key,) = good
    for body in ([], 1, "x", {}, {key: 1}, {key: None}, {key: {}}, {key: [[]]}, {key: [1]}):
        response = server.post(path, body)
        assert response.status_code == 422, (body, response.text)
        assert list(response.json()) == ["error", "error_type"]
    for broken in (b"", b"{", b"nul", b'{"inputs": "\xff"}', b"{" * 5000, b'{"inputs": NaN}', b"[" * 200_000):
        response = httpx.post(server.url + path, content=broken, headers={"content-type": "application/json"})
        assert response.status_code in (400, 422), response.text
        assert response.json()["error_type"] == "validation"
    assert server.post(path, good).status_code == 200


def test_the_field_and_what_it_held_are_named(server: Server) -> None:
    def told(path: str, body: Any) -> dict[str, Any]:
        answer: dict[str, Any] = server.post(path, body).json()
        return answer

    native = told("/generate", {"inputs": "x", "parameters": {"stop": ["a", 3]}})["error"]
    assert native.endswith("target type: `parameters.stop[1]` must be a string. Given: 3")
    error = told("/v1/completions", {"prompt": "x", "temperature": "hot"})["error"]
    assert error["param"] == "temperature"
    assert error["message"].endswith("Given: hot")
    assert told("/v1/completions", {})["error"]["param"] == "prompt"
    assert told("/v1/completions", {"prompt": "x", "max_tokens": -1})["error"]["param"] == "max_tokens"
    long = told("/generate", {"inputs": "x", "parameters": {"top_k": "y" * 100_000}})["error"]
    assert len(long) < 400


@pytest.mark.parametrize(
    "content, why",
    [
        (b'{"inputs":\n NaN}', "a value is expected, not `NaN`, at line 2 column 2"),
        (b'{"inputs": "x"', "it ends early, where `,` or `}` is expected, at line 1 column 15"),
        (b'{"inputs": "\xff"}', "it is not UTF-8: byte 0xff at line 1 column 13"),
        (b'{"x":' + b"[" * 100_000, "it is nested too deeply"),
    ],
)
def test_where_a_body_stops_being_json_is_told(server: Server, content: bytes, why: str) -> None:
    response = httpx.post(server.url + "/generate", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"] == "Failed to parse the request body as JSON: " + why


CHAT = '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1%s}'
TWICE = [
    ("/generate", '{"inputs": "x", "inputs": "y"}', "inputs", ""),
    ("/generate", '{"inputs": "x", "parameters": {"seed": 1, "top_k": 3, "seed": 1}}', "seed", " - at `$.parameters`"),
    ("/generate", '{"inputs": "x", "unknown": {"a": {"b": 1, "b": 2}}}', "b", " - at `$.unknown.a`"),
    ("/generate_stream", '{"inputs": "x", "\\u0069nputs": "x"}', "inputs", ""),
    ("/generate", '{"inputs": "x", "parameters": {"grammar": {"type": "json", "value": {"properties": {"a": {}, "a": '
     '{}}}}}}', "a", " - at `$.parameters.grammar.value.properties`"),
    ("/", '{"stream": false, "inputs": "x", "stream": false}', "stream", ""),
    ("/tokenize", '{"inputs": "x", "inputs": "x"}', "inputs", ""),
    ("/chat_tokenize", CHAT % ', "max_tokens": 1', "max_tokens", ""),
    ("/vertex", '{"instances": [{"inputs": "x"}, {"inputs": "x", "inputs": "y"}]}', "inputs", " - at `$.instances[1]`"),
    ("/invocations", '{"inputs": "x", "inputs": "y"}', "inputs", ""),
    ("/v2/models/m/infer", '{"id": "1", "inputs": [], "outputs": [], "id": "2"}', "id", ""),
    ("/v1/completions", '{"prompt": "x", "prompt": "y"}', "prompt", ""),
    ("/v1/completions", '{"prompt": "x", "stream_options": {"include_usage": true, "include_usage": true}}',
     "include_usage", " - at `$.stream_options`"),
    ("/v1/chat/completions", CHAT % ', "messages": []', "messages", ""),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "x", "role": "system"}]}', "role",
     " - at `$.messages[0]`"),
    ("/v1/chat/completions", CHAT % ', "tools": [{"type": "function", "function": {"name": "f", "parameters": '
     '{"properties": {"a": {"type": "string", "type": "null"}}}}}]', "type",
     " - at `$.tools[0].function.parameters.properties.a`"),
    ("/v1/chat/completions", CHAT % ', "metadata": {"a": "1", "a": "2"}', "a", " - at `$.metadata`"),
    ("/v1/chat/completions", CHAT % ', "logit_bias": {"5": 1, "5": 2}', "5", " - at `$.logit_bias`"),
    ("/invocations", CHAT % ', "max_tokens": 2', "max_tokens", ""),
]  # fmt: skip


@pytest.mark.parametrize("path, body, key, where", TWICE)
def test_a_key_given_twice_is_refused_with_its_place(
    server: Server, path: str, body: str, key: str, where: str
) -> None:
    response = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    openai = path.startswith("/v1/") or ("messages" in body and path == "/invocations")
    assert response.status_code == (400 if openai else 422)
    message = error["message"] if openai else error
    assert message == (
        f"Failed to deserialize the JSON body into the target type: duplicate field `{key}`{where}. "
        "A key may be given once"
    )
    if openai:
        assert error["param"] == (where[8:-1].replace("[", ".").replace("]", "") + "." + key).lstrip(".")


def test_a_key_may_come_again_in_another_object(server: Server) -> None:
    body = '{"inputs": "x", "x": {"inputs": 1, "x": [{"a": 1}, {"a": 1, "A": 2, "": 3}]}, "parameters": {"top_k": 3}}'
    assert httpx.post(server.url + "/generate", content=body, headers={"content-type": "application/json"}).is_success


def test_the_prompts_length_is_bounded_to_the_token(server: Server) -> None:
    def status(num_prompt: int, **parameters: int) -> int:
        return server.post("/generate", {"inputs": "x" * num_prompt, "parameters": parameters}).status_code

    assert (status(499), status(500)) == (200, 422)
    assert (status(498, max_new_tokens=2), status(499, max_new_tokens=2)) == (200, 422)
    assert (status(3000, truncate=499), status(3000, truncate=500)) == (200, 422)
