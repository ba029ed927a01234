"""Routes required by cloud platforms (SageMaker, Vertex AI, KServe), and the documentation that the server shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support_ports import unused_port
from support_server import TEXT, Server, byte_model

from tokenmill.server.routes.table import ROUTES

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
KEY = {"authorization": "Bearer secret"}


def free_port() -> int:
    return unused_port()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    patch = pytest.MonkeyPatch()
    patch.setenv("AIP_PREDICT_ROUTE", "/custom/predict")
    patch.setenv("AIP_HEALTH_ROUTE", "/custom/health")
    running = Server(model, free_port(), "--mock-text", TEXT, "--mock-step-ms", "1", "--max-concurrent-requests", "8")
    patch.undo()
    yield running
    running.stop()


# --- SageMaker ---------------------------------------------------------------------------------------------------


def test_invocations_takes_the_bodies_of_three_routes(server: Server) -> None:
    body = {"inputs": "ab", "parameters": {"max_new_tokens": 2}}
    assert server.post("/invocations", body).json() == server.post("/", body).json() == [{"generated_text": "abZw"}]
    events = server.events("/invocations", {**body, "stream": True})
    assert events[-1]["generated_text"] == "abZw"
    chat = server.post("/invocations", {**CHAT, "max_tokens": 2}).json()
    assert (chat["object"], chat["choices"][0]["message"]["content"]) == ("chat.completion", "Zw")
    assert server.events("/invocations", {**CHAT, "max_tokens": 2, "stream": True})[-1] == "[DONE]"
    completion = server.post("/invocations", {"prompt": ["x", "y"], "max_tokens": 2}).json()
    assert [choice["text"] for choice in completion["choices"]] == ["Zw", "Zw"]


def test_invocations_answers_errors_in_the_dialect_of_the_body(server: Server) -> None:
    native = server.post("/invocations", {"inputs": "x", "parameters": {"top_p": 2}})
    assert (native.status_code, native.json()["error_type"]) == (422, "validation")
    openai = server.post("/invocations", {**CHAT, "top_p": 2})
    assert (openai.status_code, openai.json()["error"]["param"]) == (400, "top_p")
    neither = server.post("/invocations", {"input": "x"})
    assert neither.status_code == 422
    assert "did not match any variant" in neither.json()["error"]


# --- Vertex AI ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/vertex", "/custom/predict"])
def test_vertex_answers_a_list_of_texts_in_order(server: Server, path: str) -> None:
    instances = [
        {"inputs": "x", "parameters": {"max_new_tokens": 1}},
        {**CHAT, "max_tokens": 3},
        {"inputs": "y", "parameters": {"max_new_tokens": 5, "return_full_text": True}},
        {"inputs": "z"},
    ]
    response = server.post(path, {"instances": instances})
    assert response.status_code == 200
    assert response.json() == {"predictions": ["Z", "Zw", "yZwöl", TEXT]}


def test_vertex_common_parameters_are_defaults_of_plain_prompts(server: Server) -> None:
    body = {"instances": [{"inputs": "x"}, {"inputs": "x", "parameters": {"max_new_tokens": 1}}],
            "parameters": {"max_new_tokens": 2}}  # fmt: skip
    assert server.post("/vertex", body).json() == {"predictions": ["Zw", "Z"]}


def test_vertex_without_instances_is_refused_as_tgi_does(server: Server) -> None:
    response = server.post("/vertex", {"instances": []})
    assert response.status_code == 422
    assert response.json() == {"error": "Input validation error", "error_type": "Input validation error"}


@pytest.mark.parametrize(
    "instance, told",
    [
        ({}, "`inputs` or `messages`"),
        ({"inputs": 1}, "instances[1]: `inputs` must be a string. Given: 1"),
        ({"inputs": "x", "parameters": {"top_p": 3}}, "`top_p` must be"),
        ({"inputs": "x", "parameters": {"details": True}}, "`details` is not supported here"),
        ({"inputs": "x", "parameters": {"best_of": 2}}, "`best_of` != 1 is not allowed for this endpoint"),
        ({**CHAT, "stream": True}, "`stream` is not supported here"),
        ({**CHAT, "n": 2}, "`n` must be 1"),
        ({**CHAT, "logprobs": True}, "`logprobs` is not supported here"),
        ({"messages": "x"}, "instances[1]: `messages` must be a list of objects. Given: x"),
    ],
)
def test_vertex_names_what_is_wrong_with_an_instance(server: Server, instance: dict[str, Any], told: str) -> None:
    response = server.post("/vertex", {"instances": [{"inputs": "x"}, instance]})
    assert response.status_code == 422
    assert told in response.json()["error"]


def test_more_prompts_than_could_ever_run_are_refused_for_good(server: Server) -> None:
    for path, body in (
        ("/vertex", {"instances": [{"inputs": "x"}] * 9}),
        ("/v2/models/m/versions/1/infer", infer_body(*["x"] * 9)),
    ):
        response = server.post(path, body)
        assert response.status_code == 422
        assert "supports up to 8 prompts. Given: 9" in response.json()["error"]
    assert server.post("/vertex", {"instances": [{"inputs": "x"}] * 8}).status_code == 200
    assert server.metric("tokenmill_requests_in_flight") == 0


def test_vertex_health_is_health(server: Server) -> None:
    assert httpx.get(server.url + "/custom/health").status_code == 200


# --- KServe ------------------------------------------------------------------------------------------------------


def infer_body(*prompts: str, **more: Any) -> dict[str, Any]:
    inputs = [
        {"name": f"in{i}", "shape": [1, len(p)], "datatype": "BYTES", "data": list(p.encode())}
        for i, p in enumerate(prompts)
    ]
    return {"id": "7", "inputs": inputs, "outputs": [{"name": f"out{i}"} for i in range(len(prompts))], **more}


def test_kserve_says_what_it_is_and_that_it_is_ready(server: Server) -> None:
    def got(path: str) -> Any:
        response = httpx.get(server.url + path)
        assert response.status_code == 200
        return response.json()

    assert got("/v2/health/live") == got("/v2/health/ready") == {"live": True}
    about = got("/v2")
    assert list(about) == ["name", "version", "extensions"]
    assert (about["name"], about["extensions"]) == ("text-generation-inference", ["health", "models", "metrics"])
    expected = {"name": "any", "version": "3", "extensions": ["infer", "ready"]}
    assert got("/v2/models/any/versions/3") == expected
    assert got("/v2/models/any/versions/3/ready") == {"live": True}
    assert got("/v2/models/org/name")["name"] == "org/name"


@pytest.mark.parametrize("path", ["/v2/models/m/versions/1/infer", "/v2/models/org/m/infer"])
def test_kserve_generates_for_each_input(server: Server, path: str) -> None:
    answer = server.post(path, infer_body("ä", "b", parameters={"max_new_tokens": 4})).json()
    data = list("Zwö".encode())
    assert answer == {
        "id": "7",
        "outputs": [{"name": f"out{i}", "shape": [1, 4], "datatype": "BYTES", "data": data} for i in range(2)],
    }


def test_kserve_takes_strings_as_the_protocol_writes_them(server: Server) -> None:
    body = infer_body("x", parameters={"max_new_tokens": 1, "return_full_text": True})
    body["inputs"][0]["data"] = ["hé"]
    answer = server.post("/v2/models/m/versions/1/infer", body).json()
    assert bytes(answer["outputs"][0]["data"]).decode() == "héZ"


def test_kserve_samples_if_no_parameters_are_given_like_the_native_routes(server: Server) -> None:
    answer = server.post("/v2/models/m/versions/1/infer", infer_body("x")).json()
    assert bytes(answer["outputs"][0]["data"]).decode() == TEXT


def test_kserve_refuses_with_tgis_types(server: Server) -> None:
    def refused(**changes: Any) -> tuple[int, str, str]:
        response = server.post("/v2/models/m/versions/1/infer", {**infer_body("x"), **changes})
        return response.status_code, response.json()["error_type"], response.json()["error"]

    assert refused(outputs=[])[:2] == (422, "length mismatch")
    one = infer_body("x")["inputs"][0]
    assert refused(inputs=[{**one, "data": [0xFF]}])[:2] == (422, "utf8")
    assert refused(inputs=[{**one, "data": [256]}])[:2] == (422, "validation")
    assert refused(inputs=[{**one, "data": ["a", 1]}])[:2] == (422, "validation")
    assert "cannot be empty" in refused(inputs=[{**one, "data": []}])[2]
    assert "cannot be empty" in refused(inputs=[], outputs=[])[2]
    assert "`top_p`" in refused(parameters={"top_p": 2})[2]


def test_kserve_paths_that_mean_nothing_are_not_found(server: Server) -> None:
    for path in ("/v2/models/m/versions/1/nope", "/v2/nope", "/v2/models/", "/v2/health/live/x"):
        missing = httpx.get(server.url + path)
        assert (missing.status_code, missing.json()["error_type"]) == (404, "not_found")
        assert path in missing.json()["error"]
    for method, path, allowed in (
        ("GET", "/v2/models/m/versions/1/infer", "POST"),
        ("POST", "/v2/models/m/versions/1/ready", "GET,HEAD"),
        ("POST", "/v2/models/m", "GET,HEAD"),
        ("POST", "/v2", "GET,HEAD"),
        ("DELETE", "/v2/health/ready", "GET,HEAD"),
    ):
        wrong = httpx.request(method, server.url + path)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, allowed)
        assert wrong.json()["error"] == f"{method} is not supported at {path}. Allowed: {allowed}"


def test_kserve_is_not_ready_while_the_model_is_loading(model: Path) -> None:
    running = Server(model, free_port(), "--mock-fault", "exit@1", "--max-engine-restarts", "1", wait=False)
    seen = set()
    try:
        for _ in range(400):
            try:
                response = httpx.get(running.url + "/v2/health/ready")
            except httpx.HTTPError:
                continue
            seen.add((response.status_code, response.json()["live"]))
            if (200, True) in seen:
                break
        assert seen <= {(200, True), (503, False)}
    finally:
        running.stop()


# --- what is open, what is shown -----------------------------------------------------------------------------------


def test_a_key_protects_every_route_that_the_policy_does_not_name(model: Path) -> None:
    open_routes = {("GET", "/health"), ("GET", "/ping"), ("GET", "/"), ("GET", "/docs"), ("GET", "/docs/"),
                   ("GET", "/docs/*"), ("GET", "/api-doc/openapi.json"), ("GET", "/metrics")}  # fmt: skip
    running = Server(model, free_port(), "--api-key", "secret")
    try:
        for route in ROUTES:
            path = route.path.replace("*", "x")
            refused = httpx.request(route.method, running.url + path, json={} if route.method == "POST" else None)
            is_open = (route.method, route.path) in open_routes
            assert (refused.status_code == 401) == (not is_open), route
            allowed = httpx.request(route.method, running.url + path, headers=KEY)
            assert allowed.status_code != 401, route
    finally:
        running.stop()


def test_the_documentation_comes_from_the_server_alone(server: Server) -> None:
    moved = httpx.get(server.url + "/docs")
    assert (moved.status_code, moved.headers["location"]) == (303, "/docs/")
    page = httpx.get(server.url + "/docs/")
    assert page.headers["content-type"].startswith("text/html")
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert links
    assert not [link for link in links if "//" in link]
    for link in (*links, "LICENSE", "NOTICE"):
        assert httpx.get(server.url + "/docs/" + link).status_code == 200
    start = httpx.get(server.url + "/docs/start.js").text
    assert '"../api-doc/openapi.json"' in start
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for odd in ("nope", "..%2fapp.py", "%2e%2e/app.py", "%00", "/etc/passwd"):
        assert httpx.get(server.url + "/docs/" + odd).status_code == 404


def test_the_document_has_every_route_and_every_reference_leads_somewhere(server: Server) -> None:
    document = httpx.get(server.url + "/api-doc/openapi.json").json()
    shown = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    for route in ROUTES:
        path = route.path.removesuffix("/*")
        assert path == "/docs" or any(m == route.method and p.startswith(path) for m, p in shown), route
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))
    assert {"compat_generate", "generate", "generate_stream", "chat_completions", "completions", "tokenize",
            "get_chat_tokenize", "get_model_info", "openai_get_model_info", "health", "metrics",
            "sagemaker_compatibility"} <= set(names)  # fmt: skip
    schemas = document["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= schemas.keys()
    assert {"ErrorResponse", "GenerateParameters", "Info", "SimpleToken"} <= schemas.keys()


def test_chat_tokenize_shows_the_prompt_and_its_tokens(server: Server) -> None:
    answer = server.post("/chat_tokenize", {"messages": [{"role": "user", "content": "é"}]}).json()
    assert list(answer) == ["tokenize_response", "templated_text"]
    assert answer["templated_text"] == "<|user|>é</s><|assistant|>"
    tokens = answer["tokenize_response"]
    raw = answer["templated_text"].encode()
    assert all(list(token) == ["id", "text", "start", "stop"] for token in tokens)
    assert b"".join(raw[token["start"] : token["stop"]] for token in tokens).replace(b"\xc3\xa9\xc3\xa9", b"\xc3\xa9") \
        == raw  # fmt: skip
    prompt = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "é"}], "max_tokens": 1})
    assert prompt.json()["usage"]["prompt_tokens"] == len(tokens)
    wrong = server.post("/chat_tokenize", {"messages": [{"role": "elf", "content": "x"}]})
    assert (wrong.status_code, wrong.json()["error_type"]) == (422, "validation")
