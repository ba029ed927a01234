"""TGI's own routes, against the real server with the mock engine, whose answer is known exactly."""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import httpx
import pytest
from support_server import TEXT, Server, scripted


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with scripted(tmp_path_factory.mktemp("model")) as running:
        yield running


NUM_BYTES = len(TEXT.encode())


def test_a_plain_answer_has_nothing_but_the_text_unless_details_are_asked_for(server: Server) -> None:
    response = server.post("/generate", {"inputs": "hello"})
    assert response.status_code == 200
    assert response.content == b'{"generated_text":"' + TEXT.encode() + b'"}'


def test_details_count_every_token_and_name_the_end(server: Server) -> None:
    details = server.post("/generate", {"inputs": "hello", "parameters": {"details": True}}).json()["details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == (
        "eos_token",
        NUM_BYTES + 1,
        None,
    )
    assert details["prefill"] == []
    last = details["tokens"][-1]
    assert last == {"id": 0, "text": "</s>", "logprob": -0.25, "special": True}
    assert "".join(token["text"] for token in details["tokens"] if not token["special"]) == TEXT


def test_a_token_inside_a_character_has_no_text_and_the_next_one_has_all(server: Server) -> None:
    tokens = server.post("/generate", {"inputs": "x", "parameters": {"details": True, "max_new_tokens": 4}}).json()
    assert [token["text"] for token in tokens["details"]["tokens"]] == ["Z", "w", "", "ö"]


def test_parameters_of_null_and_fields_of_null_are_the_defaults(server: Server) -> None:
    nothing = server.post("/generate", {"inputs": "x", "parameters": None}).json()
    fields = {"details": None, "stop": None, "watermark": None, "do_sample": None, "unknown": 1}
    assert nothing == server.post("/generate", {"inputs": "x", "parameters": fields}).json()


def test_the_prompt_comes_first_where_tgi_puts_it(server: Server) -> None:
    body = {"inputs": "ab", "parameters": {"max_new_tokens": 2}}
    assert server.post("/", body).json() == [{"generated_text": "abZw"}]
    assert server.post("/generate", body).json() == {"generated_text": "Zw"}
    body["parameters"]["return_full_text"] = True
    assert server.post("/generate", body).json() == {"generated_text": "abZw"}
    body["parameters"]["return_full_text"] = False
    assert server.post("/", body).json() == [{"generated_text": "Zw"}]


def test_a_stream_has_an_event_a_token_and_the_text_in_the_last(server: Server) -> None:
    events = server.events("/generate_stream", {"inputs": "x", "parameters": {"max_new_tokens": 5, "details": True}})
    assert [event["index"] for event in events] == [1, 2, 3, 4, 5]
    assert list(events[0]) == ["index", "token", "generated_text", "details"]
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == "Zwöl"
    assert events[-1]["details"] == {"finish_reason": "length", "generated_tokens": 5, "seed": None, "input_length": 1}
    assert "".join(event["token"]["text"] for event in events) == "Zwöl"


def test_the_compat_route_streams_when_asked(server: Server) -> None:
    events = server.events("/", {"inputs": "x", "stream": True, "parameters": {"max_new_tokens": 2}})
    assert events[-1]["generated_text"] == "xZw"


@pytest.mark.parametrize("stop", [["ämp"], "ämp", ["nothing", "mpf", "ämp"]])
def test_a_stop_string_ends_the_text_and_stays_in_it(server: Server, stop: object) -> None:
    parameters = {"stop": stop, "details": True}
    answer = server.post("/generate", {"inputs": "x", "parameters": parameters}).json()
    assert answer["generated_text"] == "Zwölf Boxkämp"
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["details"]["generated_tokens"] == len("Zwölf Boxkämp".encode())
    events = server.events("/generate_stream", {"inputs": "x", "parameters": parameters})
    assert "".join(event["token"]["text"] for event in events) == "Zwölf Boxkämp"
    assert events[-1]["generated_text"] == "Zwölf Boxkämp"


def test_a_seed_is_drawn_and_shown_only_when_tokens_are_sampled(server: Server) -> None:
    def seed(**parameters: object) -> object:
        body = {"inputs": "x", "parameters": {"details": True, "max_new_tokens": 1, **parameters}}
        return server.post("/generate", body).json()["details"]["seed"]

    assert seed(seed=7) is None
    assert seed(seed=7, do_sample=True) == 7
    assert seed(seed=2**64 - 1, temperature=0.5) == 2**64 - 1
    assert isinstance(seed(do_sample=True), int)
    assert seed(temperature=0) is None


def test_best_of_returns_the_other_sequences_beside_the_best(server: Server) -> None:
    parameters = {"best_of": 2, "do_sample": True, "details": True, "max_new_tokens": 3, "top_n_tokens": 2}
    details = server.post("/generate", {"inputs": "x", "parameters": parameters}).json()["details"]
    (other,) = details["best_of_sequences"]
    assert other["generated_text"] == "Zw"
    assert other["seed"] != details["seed"]
    assert len(other["top_tokens"]) == len(details["top_tokens"]) == 3
    assert [len(step) for step in details["top_tokens"]] == [2, 2, 2]


def test_prompt_tokens_have_log_probabilities_but_the_first(server: Server) -> None:
    parameters = {"decoder_input_details": True, "max_new_tokens": 1}
    prefill = server.post("/generate", {"inputs": "abc", "parameters": parameters}).json()["details"]["prefill"]
    assert [(token["text"], token["logprob"]) for token in prefill] == [("a", None), ("b", -0.25), ("c", -0.25)]


def test_headers_say_how_long_and_how_much(server: Server) -> None:
    headers = server.post("/generate", {"inputs": "héllo", "parameters": {"max_new_tokens": 3}}).headers
    assert headers["x-compute-type"] == "1-mock"
    assert headers["x-compute-characters"] == "5"
    assert headers["x-prompt-tokens"] == "6"
    assert headers["x-generated-tokens"] == "3"
    assert float(headers["x-compute-time"]) > 0
    for name in ("total-time", "validation-time", "queue-time", "inference-time", "time-per-token"):
        assert headers["x-" + name].isdigit()
    assert "server" not in headers
    with httpx.stream("POST", server.url + "/generate_stream", json={"inputs": "x"}) as stream:
        names = {name for name in stream.headers if name.startswith(("x-", "cache"))}
    assert names == {"x-compute-type", "x-compute-characters", "x-accel-buffering", "x-request-id", "cache-control"}


def test_a_request_id_comes_back_unless_it_is_odd(server: Server) -> None:
    def sent(value: str) -> str:
        return httpx.get(server.url + "/info", headers={"x-request-id": value}).headers["x-request-id"]

    assert sent("abc-123_x") == "abc-123_x"
    assert sent("a b") != "a b"
    assert sent("y" * 200) != "y" * 200


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"temperature": -1}, "`temperature` must be strictly positive"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"max_new_tokens": 600},
         "`inputs` tokens + `max_new_tokens` must be <= 500. Given: 1 `inputs` tokens and 600 `max_new_tokens`"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 499. Given: 0"),
        ({"grammar": {"type": "regex", "value": 1}}, "grammar is not supported"),
        ({"grammar": {"type": "regex"}}, "grammar is not valid: `value` is missing"),
        ({"adapter_id": "x"}, "`adapter_id` 'x' is unknown: no adapters are loaded"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ["/generate", "/generate_stream"])
def test_a_broken_rule_is_422_in_tgis_words(
    server: Server, route: str, parameters: dict[str, object], message: str
) -> None:
    response = server.post(route, {"inputs": "x", "parameters": parameters})
    if route == "/generate_stream" and "best_of" in parameters:
        message = "`best_of` != 1 is not supported when streaming tokens"
    assert response.status_code == 422
    assert response.json() == {"error": "Input validation error: " + message, "error_type": "validation"}


def test_an_empty_prompt_and_stream_rules_are_refused(server: Server) -> None:
    assert "cannot be empty" in server.post("/generate", {"inputs": ""}).json()["error"]
    body = {"inputs": "x", "parameters": {"decoder_input_details": True}}
    assert "when streaming" in server.post("/generate_stream", body).json()["error"]


@pytest.mark.parametrize(
    "content, content_type, status",
    [
        (b'{"inputs": "x"}', "text/plain", 415),
        (b'{"inputs": "x"', "application/json", 400),
        (b'{"inputs": "\\ud800"}', "application/json", 400),
        (b'{"inputs": "x", "deep": ' + b"[" * 100_000, "application/json", 400),
        (b'{"inputs": 1}', "application/json", 422),
        (b'{"parameters": {}}', "application/json", 422),
        (b'{"inputs": "x", "parameters": {"max_new_tokens": -1}}', "application/json", 422),
        (b'{"inputs": "x", "parameters": {"max_new_tokens": "1"}}', "application/json", 422),
        (b'{"inputs": "' + b"x" * 2_000_000 + b'"}', "application/json", 413),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_read_is_json_with_tgis_status(
    server: Server, content: bytes, content_type: str, status: int
) -> None:
    response = httpx.post(server.url + "/generate", content=content, headers={"content-type": content_type})
    assert response.status_code == status
    assert response.json()["error_type"] == "validation"
    assert httpx.post(server.url + "/generate", content=b'{"inputs":"x"}',
                      headers={"content-type": "application/vnd.x+json; charset=utf-8"}).status_code == 200  # fmt: skip


ROUTES_WITH_BODIES = (
    "/", "/generate", "/generate_stream", "/tokenize", "/chat_tokenize", "/invocations", "/vertex",
    "/v1/chat/completions", "/v1/completions", "/v2/models/m/versions/1/infer",
)  # fmt: skip


@pytest.mark.parametrize("path", ROUTES_WITH_BODIES)
def test_a_compressed_body_is_refused_with_the_reason(server: Server, path: str) -> None:
    def refused(*encodings: str) -> httpx.Response:
        headers = [("content-type", "application/json"), *(("content-encoding", one) for one in encodings)]
        return httpx.post(server.url + path, content=gzip.compress(b'{"inputs":"x"}'), headers=headers)

    for encodings in (("gzip",), ("x-odd",), ("identity, br",), ("identity", "GZIP"), ("identity", "zstd, identity")):
        response = refused(*encodings)
        assert (response.status_code, response.headers["accept-encoding"]) == (415, "identity")
        error = response.json()["error"]
        message = error["message"] if path.startswith("/v1/") else error
        assert message.startswith(f"The Content-Encoding {', '.join(encodings)!r} is not supported")
        assert response.json()["error_type"] == "validation"
    for encodings in (("identity",), ("",), ("Identity",)):
        assert refused(*encodings).status_code == 400  # no JSON


def test_a_chunked_body_is_limited_too(server: Server) -> None:
    def parts() -> Iterator[bytes]:
        yield b'{"inputs": "'
        for _ in range(30):
            yield b"x" * 100_000

    response = httpx.post(server.url + "/generate", content=parts(), headers={"content-type": "application/json"})
    assert response.status_code == 413


def test_unknown_paths_and_methods_have_tgis_empty_answers(server: Server) -> None:
    missing = httpx.get(server.url + "/nope")
    assert (missing.status_code, missing.content) == (404, b"")
    wrong = httpx.get(server.url + "/generate")
    assert (wrong.status_code, wrong.content, wrong.headers["allow"]) == (405, b"", "POST")
    assert httpx.head(server.url + "/health").status_code == 200


def test_tokenize_gives_slices_of_bytes(server: Server) -> None:
    tokens = server.post("/tokenize", {"inputs": "aé"}).json()
    assert tokens[0] == {"id": tokens[0]["id"], "text": "a", "start": 0, "stop": 1}
    assert (tokens[-1]["start"], tokens[-1]["stop"]) in ((2, 3), (1, 3))
    assert server.post("/tokenize", {"inputs": ""}).status_code == 422


def test_info_has_tgis_fields_and_health_is_empty(server: Server) -> None:
    info = httpx.get(server.url + "/info").json()
    assert list(info)[:14] == [
        "model_id", "model_sha", "model_pipeline_tag", "max_concurrent_requests", "max_best_of", "max_stop_sequences",
        "max_input_tokens", "max_total_tokens", "validation_workers", "max_client_batch_size", "router", "version",
        "sha", "docker_label",
    ]  # fmt: skip
    assert (info["max_input_tokens"], info["max_total_tokens"], info["router"]) == (499, 500, "text-generation-router")
    for path in ("/health", "/ping", "/"):
        response = httpx.get(server.url + path)
        assert (response.status_code, response.content) == (200, b"")


def test_browsers_may_call_with_a_key_and_any_other_header(server: Server) -> None:
    headers = {
        "origin": "http://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization,x-stainless-lang",
    }
    response = httpx.options(server.url + "/generate", headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["access-control-allow-methods"] == "GET,POST"
    assert response.headers["access-control-allow-headers"] == headers["access-control-request-headers"]
    assert "access-control-allow-credentials" not in response.headers
    plain = httpx.post(server.url + "/generate", json={"inputs": "x"}, headers={"origin": "http://a.example"})
    assert plain.headers["access-control-allow-origin"] == "*"
    assert "x-total-time" in plain.headers["access-control-expose-headers"]
    with httpx.stream("POST", server.url + "/generate_stream", json={"inputs": "x"}) as stream:
        assert stream.headers["access-control-allow-origin"] == "*"


def test_a_stream_is_framed_as_tgi_frames_it(server: Server) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 2, "details": True}}
    with httpx.stream("POST", server.url + "/generate_stream", json=body) as stream:
        raw = b"".join(stream.iter_raw())
        headers = stream.headers
    ids = [event["token"]["id"] for event in server.events("/generate_stream", body)]
    token = b'{"id":%d,"text":"%s","logprob":-0.25,"special":false}'
    assert raw == (
        b'data: {"index":1,"token":' + token % (ids[0], b"Z") + b',"generated_text":null,"details":null}\n\n'
        b'data: {"index":2,"token":' + token % (ids[1], b"w") + b',"generated_text":"Zw","details":'
        b'{"finish_reason":"length","generated_tokens":2,"seed":null,"input_length":1}}\n\n'
    )
    assert (headers["content-type"], headers["cache-control"]) == ("text/event-stream", "no-cache")
    assert headers["transfer-encoding"] == "chunked"


def test_a_receipt_is_the_last_key_if_asked_for(server: Server) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 3, "details": True}}
    asked = {**body, "receipt": True}
    for path in ("/generate", "/"):
        answer = server.post(path, asked).json()
        plain = answer[0] if path == "/" else answer
        assert list(plain) == ["generated_text", "details", "receipt"]
        assert (plain["receipt"]["generated_tokens"], plain["receipt"]["prompt_tokens"]) == (3, 1)
        assert plain["receipt"]["parameters"]["max_new_tokens"] == 3
    events = server.events("/generate_stream", asked)
    assert ["receipt" in event for event in events] == [False, False, True]
    by_header = server.post("/generate", body, headers={"x-receipt": "1"}).json()
    assert "receipt" in by_header
    assert "receipt" not in server.post("/generate", {**body, "receipt": False}, headers={"x-receipt": "1"}).json()
    assert "receipt" not in server.post("/generate", body).json()


def test_a_watermark_may_be_asked_for(server: Server) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 2, "watermark": True}, "receipt": True}
    parameters = server.post("/generate", body).json()["receipt"]["parameters"]
    assert (parameters["watermark_gamma"], parameters["watermark_delta"]) == (0.5, 2.0)
