"""A deployment on a real Ray cluster of this host: the routes, updates, failures."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support_server import Server, unused_port

ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve")

from bench import ray_cluster  # noqa: E402

pytestmark = pytest.mark.slow

MODEL = {"name": "m", "options": {**ray_cluster.MOCK, "mock_step_ms": 5.0}, "min_replicas": 2}


@pytest.fixture(scope="module")
def on() -> Iterator[ray_cluster.Deployed]:
    with ray_cluster.deployed(2) as one:
        one.run(MODEL)
        yield one


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server with the same options, for comparison."""
    port = unused_port()
    running = Server("", port, "--mock-step-ms", "5", "--max-batch-size", "4", "--cpu-threads", "1")
    yield running
    running.stop()


CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0}
CASES: list[tuple[str, str, Any]] = [
    ("GET", "/info", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/none", None),
    ("GET", "/nowhere", None),
    ("GET", "/docs", None),
    ("DELETE", "/generate", None),
    ("OPTIONS", "/generate", None),
    ("HEAD", "/info", None),
    ("POST", "/generate", {"inputs": "a", "parameters": {"max_new_tokens": 3, "details": True}}),
    ("POST", "/generate", {"inputs": "", "parameters": {}}),
    ("POST", "/generate", "not an object"),
    ("POST", "/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": 3}}),
    ("POST", "/", {"inputs": "a", "parameters": {"max_new_tokens": 3}, "stream": True}),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", "/v1/chat/completions", {**CHAT, "messages": []}),
    ("POST", "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3, "stream": True}),
    ("POST", "/tokenize", {"inputs": "zwölf"}),
    ("POST", "/v2/models/x/infer", {"inputs": [{"name": "a", "data": ["x"]}], "outputs": [{"name": "o"}]}),
    ("GET", "/v2/health/ready", None),
]
_VARIES = re.compile(rb'"id":"[^"]*"|"created":\d+|"system_fingerprint":"[^"]*"|"cached_tokens":\d+|"seed":\d+')
_TIMES = {"date", "server", "x-request-id", "content-length", *(f"x-{name}-time" for name in (
    "total", "compute", "validation", "queue", "inference")), "x-time-per-token"}  # fmt: skip


@pytest.mark.parametrize("method,path,body", CASES, ids=[f"{m}{p}" for m, p, _ in CASES])
def test_every_route_answers_as_one_server_does(
    on: ray_cluster.Deployed, server: Server, method: str, path: str, body: Any
) -> None:
    answers = [httpx.request(method, url + path, json=body, timeout=30) for url in (server.url, on.url)]
    one, deployed = answers
    assert deployed.status_code == one.status_code
    assert _VARIES.sub(b"", deployed.content) == _VARIES.sub(b"", one.content)
    headers = [sorted(pair for pair in found.headers.multi_items() if pair[0] not in _TIMES) for found in answers]
    assert headers[1] == headers[0]
    assert {name for name, _ in deployed.headers.multi_items()} - {"server"} == set(one.headers)


def test_events_come_as_they_are_made(on: ray_cluster.Deployed) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 40}}
    with httpx.stream("POST", on.url + "/generate_stream", json=body, timeout=30) as answer:
        parts = list(answer.iter_raw())
    assert len(parts) > 5


def test_a_client_that_leaves_ends_its_request(on: ray_cluster.Deployed) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 4000}}
    with httpx.stream("POST", on.url + "/generate_stream", json=body, timeout=30) as answer:
        next(answer.iter_raw())

    def running() -> float:
        text = httpx.get(on.url + "/metrics", timeout=30).text
        return sum(float(line.split()[1]) for line in text.splitlines() if line.startswith("tgi_batch_current_size{"))

    assert ray_cluster.until(lambda: running() == 0, 10) < 10


def test_too_long_a_body_is_refused_by_the_server(on: ray_cluster.Deployed, server: Server) -> None:
    body = {"inputs": "a" * 2_100_000}
    answers = [httpx.post(url + "/generate", json=body, timeout=30) for url in (server.url, on.url)]
    assert [one.status_code for one in answers] == [413, 413]
    assert answers[0].json() == answers[1].json()


def test_replicas_that_die_are_replaced_and_their_streams_go_on(on: ray_cluster.Deployed) -> None:
    before = on.continued()
    asked = ray_cluster.bodies(6, 200)
    whole = asyncio.run(ray_cluster.streams(on.url, asked))
    killed = on.replicas()[0]
    killer = threading.Timer(0.4, lambda: on.kill(killed))
    killer.start()
    again = asyncio.run(ray_cluster.streams(on.url, asked))
    killer.join()
    assert [one.error for one in again] == [""] * 6
    assert [one.text for one in again] == [one.text for one in whole]
    assert on.continued() > before
    assert ray_cluster.until(lambda: killed not in (now := on.replicas()) and len(now) == 2, 60) < 60


def test_a_server_that_is_killed_is_replaced_without_a_failed_request(on: ray_cluster.Deployed) -> None:
    before = set(on.replicas())
    with ray_cluster.Crowd(on.url, 4, max_tokens=20) as crowd:
        time.sleep(0.5)
        os.kill(server_pids()[0], signal.SIGKILL)
        healed = ray_cluster.until(lambda: set(now := on.replicas()) != before and len(now) == 2, 60)
    assert healed < 60
    assert crowd.failures == []


def server_pids() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"tokenmill.parent" in words and b"--hostname=127.0.0.1" in words:
            found.append(int(path.parent.name))
    return found


def test_an_update_under_load_fails_no_request(on: ray_cluster.Deployed) -> None:
    (row,) = ray_cluster.update(on, longest=300)
    assert row.good, row.figures


def test_two_models_a_prefix_a_key_and_a_direct_way(on: ray_cluster.Deployed) -> None:
    keyed = {"api_key": "secret", "max_concurrent_requests": 1}
    models = [
        {"name": name, "options": {**ray_cluster.MOCK, **more, "mock_text": f"{name} "}, "direct": name == "two"}
        for name, more in (("one", keyed), ("two", {}))
    ]
    on.run(*models)
    headers = {"authorization": "Bearer secret"}
    for body, path in (({"model": "two"}, ""), ({}, "/two")):
        asked = {"prompt": "a", "max_tokens": 4, **body}
        answer = httpx.post(on.url + path + "/v1/completions", json=asked, timeout=30)
        assert answer.json()["choices"][0]["text"].startswith("two")
    listed = httpx.get(on.url + "/v1/models", headers=headers, timeout=30).json()["data"]
    assert [one["id"] for one in listed] == ["one", "two"]
    missing = httpx.post(on.url + "/v1/completions", json={"prompt": "a", "model": "three"}, timeout=30)
    assert missing.status_code == 404
    assert json.loads(missing.content)["error"]["code"] == "model_not_found"
    for path in ("/v1/models", "/replicas"):
        refused = httpx.get(on.url + path, timeout=30)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert httpx.get(on.url + "/health", timeout=30).status_code == 200
    replicas = httpx.get(on.url + "/replicas", headers=headers, timeout=30).json()
    assert [(one["model"], bool(one["address"])) for one in replicas] == [("one", False), ("two", True)]
    busy = threading.Thread(target=lambda: ask_one(400))

    def ask_one(tokens: int) -> httpx.Response:
        body = {"prompt": "a", "max_tokens": tokens, "ignore_eos": True}
        return httpx.post(on.url + "/one/v1/completions", json=body, headers=headers, timeout=60)

    busy.start()
    time.sleep(1)
    refused = ask_one(1)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(refused.headers["retry-after"]) > 0
    busy.join()
    direct = {"x-tokenmill-route": "direct"}
    asked = {"inputs": "a", "parameters": {"max_new_tokens": 4}}
    answer = httpx.post(on.url + "/two/generate", json=asked, headers=direct, timeout=30, follow_redirects=True)
    assert str(answer.url) == replicas[1]["address"] + "/generate"
    assert answer.json()["generated_text"].startswith("two")
