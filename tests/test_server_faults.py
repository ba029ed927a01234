"""Faults around a request: clients that disconnect or do not read, overload, engines that die, shutdown."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support_ports import unused_port
from support_server import TEXT, Server, byte_model, eventually

FOREVER = {"inputs": "x", "parameters": {"max_new_tokens": 8000, "ignore_eos": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    running = Server(model, unused_port(), "--mock-text", TEXT, "--mock-step-ms", "1", "--api-key", "Secret",
                     "--max-concurrent-requests", "4", "--cors-allow-origin", "http://a.example")  # fmt: skip
    yield running
    running.stop()


KEY = {"authorization": "Bearer Secret"}


def raw_stream(server: Server, path: str = "/generate_stream", body: Any = FOREVER) -> socket.socket:
    """Return a connection with a requested stream of which nothing was read."""
    sock = socket.create_connection(("127.0.0.1", server.port))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer Secret\r\ncontent-type: application/json\r\n"
    sock.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content)
    return sock


def running(server: Server) -> float:
    return server.metric("tgi_batch_current_size")


def test_a_request_without_the_key_is_refused_everywhere_but_where_orchestrators_look(server: Server) -> None:
    for path in ("/info", "/v1/models", "/v1/models/x"):
        assert httpx.get(server.url + path).status_code == 401
    for path in ("/health", "/ping", "/", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200
    refused = server.post("/generate", {"inputs": "x"}, headers={"authorization": "Bearer Secre"})
    assert (refused.status_code, refused.content) == (401, b"")
    openai = server.post("/v1/chat/completions", {})
    assert (openai.status_code, openai.json()["error"]["code"]) == (401, "invalid_api_key")
    assert server.post("/generate", {"inputs": "x"}, headers={"authorization": "bearer secret"}).status_code == 200


@pytest.mark.parametrize("value, status", [
    ("Bearer Secret ", 200), ("Bearer Secret\t", 200), ("  Bearer Secret", 200), ("Bearer    Secret", 200),
    ("Bearer\tSecret", 200), ("BEARER SECRET", 200), ("Bearer", 401), ("Bearer ", 401), ("BearerSecret", 401),
    ("Bearer Secret x", 401), ("Bearer Sec ret", 401), ("Basic Secret", 401), ("Secret", 401), ("", 401),
])  # fmt: skip
def test_white_space_around_a_key_is_no_part_of_it(server: Server, value: str, status: int) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(f"GET /info HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: {value}\r\n\r\n".encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 %d " % status)


def test_only_listed_origins_may_call_from_a_browser(server: Server) -> None:
    for origin, allowed in (("http://a.example", "http://a.example"), ("http://b.example", None)):
        response = httpx.get(server.url + "/info", headers={**KEY, "origin": origin})
        assert response.headers.get("access-control-allow-origin") == allowed
        assert response.headers["vary"] == "origin"


@pytest.mark.parametrize("path, body", [
    ("/generate_stream", FOREVER),
    ("/generate", FOREVER),
    ("/v1/chat/completions",
     {"messages": [{"role": "user", "content": "x"}], "n": 2, "ignore_eos": True, "max_tokens": 8000, "stream": True}),
])  # fmt: skip
def test_a_client_that_leaves_is_forgotten_by_the_engine(server: Server, path: str, body: Any) -> None:
    dropped = server.metric('tgi_request_failure{err="dropped"}')
    sock = raw_stream(server, path, body)
    eventually(lambda: running(server) > 0)
    sock.close()
    eventually(lambda: running(server) == 0, timeout_s=3)  # by itself it would run for eight
    eventually(lambda: server.metric('tgi_request_failure{err="dropped"}') == dropped + 1)
    eventually(lambda: server.metric("tokenmill_requests_in_flight") == 0)


def test_a_client_that_does_not_read_is_cut_off(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8000, "ignore_eos": True, "stream": True,
            "logprobs": True, "top_logprobs": 5, "n": 4}  # fmt: skip
    sock = raw_stream(server, "/v1/chat/completions", body)
    eventually(lambda: running(server) > 0)
    eventually(lambda: running(server) == 0, timeout_s=30)
    sock.settimeout(10)
    size, tail = 0, b""
    while part := sock.recv(1 << 20):
        size, tail = size + len(part), part
    sock.close()
    assert not tail.endswith(b"0\r\n\r\n")  # without the last chunk, clients detect that it is cut off
    assert size < 4 * 8000 * 500


def test_requests_beyond_the_limit_are_refused_at_once_and_told_when_to_come_back(server: Server) -> None:
    overloaded = server.metric('tgi_request_failure{err="overloaded"}')
    streams = [raw_stream(server) for _ in range(4)]
    eventually(lambda: server.metric("tokenmill_requests_in_flight") == 4)
    for path, body in (
        ("/generate", {"inputs": "x"}),
        ("/generate_stream", {"inputs": "x"}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        response = server.post(path, body, headers=KEY)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error_type"] == "overloaded"
    assert server.post("/generate", {"inputs": "x"}, headers=KEY).json()["error"] == "Model is overloaded"
    assert server.metric('tgi_request_failure{err="overloaded"}') == overloaded + 4
    for sock in streams:
        sock.close()
    eventually(lambda: server.post("/generate", {"inputs": "x"}, headers=KEY).status_code == 200)


@pytest.mark.parametrize("request_text", [
    "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n"
    "0\r\n\r\nGET /health HTTP/1.1\r\n\r\n",
    "GET /health HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    "GET /health HTTP/1.1\r\n\r\n",
    "GET /health\r\n\r\n",
    "GET /health HTTP/1.1\nhost: x\n\n",
    "GET /health HTTP/1.1\r\nhost: x\r\nx-a: 1\r\n folded\r\n\r\n",
    "GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    "GET /health HTTP/1.1\r\nhost : x\r\n\r\n",
    "GET /health HTTP/1.1\r\n host: x\r\n\r\n",
    "GET /health HTTP/1.1\r\nhost: x\r\nx-a: a\rb\r\n\r\n",
    "GET /health HTTP/1.1\r\nhost: x\r\nx-a: a\0b\r\n\r\n",
    "GET /health HTTP/1.1\r\nhost: x\r\nx a: 1\r\n\r\n",
    "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello",
    "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 5, 5\r\n\r\nhello",
    "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: +5\r\n\r\nhello",
    "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\nhello",
    "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 0x5\r\n\r\nhello",
    "POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    "GET /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 0\r\n\r\n0\r\n\r\n",
    "FOO /health HTTP/1.1\r\nhost: x\r\n\r\n",
    "\x16\x03\x01\x02\x00\x01\x00\x01",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
])  # fmt: skip
def test_a_request_that_two_parsers_could_read_differently_is_refused(server: Server, request_text: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(request_text.encode())
        answer = b""
        while part := sock.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1
    head, _, body = answer.lower().partition(b"\r\n\r\n")
    assert b"\r\nserver:" not in head
    assert b"connection: close" in head
    assert not body or json.loads(body)["error_type"] == "validation"


@pytest.mark.parametrize("endless", [b"GET /health?", b"GET /health HTTP/1.1\r\nhost: x\r\nx-a: "])
def test_headers_without_an_end_are_refused(server: Server, endless: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(endless)
        try:
            for _ in range(1000):
                sock.sendall(b"x" * 10_000)
                time.sleep(0.001)
        except OSError:
            return  # the server has closed
    pytest.fail("ten megabytes of headers were taken")


def test_long_bodies_and_many_requests_on_a_connection_are_no_long_headers(server: Server) -> None:
    with httpx.Client(base_url=server.url, headers=KEY) as client:
        for _ in range(5):
            assert client.post("/tokenize", json={"inputs": "x" * 100_000}).status_code == 200
            assert client.get("/health", headers={"x-long": "y" * 20_000}).status_code == 200


def test_others_are_answered_while_a_large_body_is_read(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": ""}] * 20_000}
    answered = 0
    with httpx.Client(base_url=server.url) as client, raw_stream(server, "/v1/chat/completions", body) as sock:
        while not select.select([sock], [], [], 0)[0]:
            answered += client.get("/health").status_code == 200
        assert sock.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert answered >= 40  # rendered between them: 16, and here 130


def three_endless(server: Server) -> tuple[dict[str, list[Any]], list[httpx.Response], list[threading.Thread]]:
    """Request endless streams, "native" and "chat", and an endless plain answer. Return their results and threads."""
    events: dict[str, list[Any]] = {}
    plain: list[httpx.Response] = []
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8000, "ignore_eos": True, "stream": True}
    threads = [
        threading.Thread(target=lambda: events.update(native=server.events("/generate_stream", FOREVER))),
        threading.Thread(target=lambda: events.update(chat=server.events("/v1/chat/completions", chat))),
        threading.Thread(target=lambda: plain.append(server.post("/generate", FOREVER))),
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: running(server) == 3)
    return events, plain, threads


def test_an_engine_that_dies_ends_its_streams_with_an_error_and_another_takes_over(model: Path) -> None:
    server = Server(model, unused_port(), "--mock-text", TEXT, "--mock-step-ms", "5")
    try:
        events, plain, threads = three_endless(server)
        os.kill(server.children()["runtime"], signal.SIGKILL)
        for thread in threads:
            thread.join(20)
        assert events["native"][-1]["error_type"] == "generation"
        assert events["chat"][-1] == "[DONE]"
        assert "the engine stopped" in events["chat"][-2]["error"]["message"]
        assert plain[0].status_code == 424
        down = httpx.get(server.url + "/health")
        assert (down.status_code, down.json()["error_type"]) == (503, "healthcheck")
        assert server.post("/generate", FOREVER).status_code == 503
        server.wait_until_ready(30)
        assert server.post("/generate", {"inputs": "x"}).json() == {"generated_text": TEXT}
    finally:
        server.stop()


def test_a_broken_row_fails_its_own_request_only(model: Path) -> None:
    server = Server(model, unused_port(), "--mock-text", TEXT, "--mock-step-ms", "1", "--mock-fault", "nan@5")
    try:
        response = server.post("/generate", {"inputs": "x"})
        assert (response.status_code, response.json()["error_type"]) == (424, "generation")
        assert response.json()["error"].startswith("Request failed during generation: Server error: ")
        assert server.post("/generate", {"inputs": "x"}).status_code == 200
    finally:
        server.stop()


def test_the_port_answers_with_the_phase_while_the_engine_is_starting(model: Path) -> None:
    server = Server(model, unused_port(), "--mock-fault", "exit@1", "--max-engine-restarts", "1", wait=False)
    try:
        eventually(lambda: _answers(server))
        response = httpx.get(server.url + "/health")
        if response.status_code == 503:
            assert response.json()["error_type"] == "healthcheck"
        server.wait_until_ready()
    finally:
        server.stop()


def _answers(server: Server) -> bool:
    try:
        return httpx.get(server.url + "/health").status_code in (200, 503)
    except httpx.HTTPError:
        return False


def test_a_terminated_server_lets_its_streams_finish(model: Path) -> None:
    server = Server(model, unused_port(), "--mock-text", TEXT, "--mock-step-ms", "20")
    events: list[Any] = []
    thread = threading.Thread(target=lambda: events.extend(server.events("/generate_stream", {"inputs": "x"})))
    thread.start()
    eventually(lambda: running(server) == 1)
    idle = socket.create_connection(("127.0.0.1", server.port))
    server.process.send_signal(signal.SIGTERM)
    thread.join(20)
    assert events[-1]["generated_text"] == TEXT
    begin = time.monotonic()
    log = server.log()
    assert server.process.returncode == 0, log
    assert time.monotonic() - begin < 15
    assert "Traceback" not in log
    idle.close()


def test_what_does_not_finish_in_time_is_told_so(model: Path) -> None:
    server = Server(model, unused_port(), "--mock-step-ms", "5", "--graceful-termination-timeout", "1")
    events, plain, threads = three_endless(server)
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(20)
    log = server.log()
    assert time.monotonic() - begin < 15
    assert server.process.returncode == 0, log
    assert events["native"][-1] == {"error": "the server is shutting down", "error_type": "healthcheck"}
    assert events["chat"][-1] == "[DONE]"
    assert "shutting down" in events["chat"][-2]["error"]["message"]
    assert (plain[0].status_code, plain[0].headers["retry-after"]) == (503, "1")
    assert "Traceback" not in log


def test_two_workers_answer_for_each_other(model: Path) -> None:
    server = Server(model, unused_port(), "--mock-text", TEXT, "--mock-step-ms", "1", "--http-workers", "2")
    try:  # the second worker may start a moment later
        eventually(lambda: all(httpx.get(server.url + "/health").status_code == 200 for _ in range(8)))
        for _ in range(20):  # each on its own connection, so on either worker
            assert server.post("/generate", {"inputs": "x"}).json() == {"generated_text": TEXT}
        for _ in range(4):
            assert server.metric("tgi_request_success") == 20
    finally:
        server.stop()
