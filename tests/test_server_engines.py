"""A server of two engines as a client sees it: streams outlive an engine that is killed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support_ports import unused_port
from support_server import TEXT, Server, byte_model, eventually


def engines_of(server: Server) -> list[psutil.Process]:
    """Return the engines' processes, in the order of their start."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    found = [child for child in children if "runtime.worker" in " ".join(child.cmdline())]
    return sorted(found, key=lambda process: process.create_time())


def side_by_side(works: list[Callable[[], Any]]) -> tuple[list[threading.Thread], dict[int, Any]]:
    """Run each in a thread. Return the threads and a dict that gets the results."""
    results: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: works[i]()})) for i in range(len(works))]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    return threads, results


def running(server: Server, engine: int) -> float:
    return server.metric(f'tokenmill_running_requests{{engine="{engine}"}}')


def test_streams_outlive_an_engine_that_is_killed(tmp_path: Path) -> None:
    text = 3 * TEXT
    options = ("--mock-text", text, "--mock-step-ms", "15", "--data-parallel-size", "2")
    server = Server(byte_model(tmp_path), unused_port(), *options)
    try:
        eventually(lambda: server.metric('tokenmill_engine_up{engine="1"}') == 1)
        chat = {"messages": [{"role": "user", "content": "x"}], "stream": True, "n": 2, "receipt": True}
        works = [lambda: server.events("/generate_stream", {"inputs": "x"})] * 6
        works += [lambda: server.events("/v1/chat/completions", chat)] * 2
        works += [lambda: server.post("/generate", {"inputs": "x"}).json()["generated_text"]] * 2
        threads, results = side_by_side(works)
        eventually(lambda: running(server, 0) + running(server, 1) == 12)
        assert running(server, 1) > 2
        engines_of(server)[1].kill()
        eventually(lambda: server.metric('tokenmill_engine_up{engine="1"}') == 0)
        assert httpx.get(server.url + "/health").status_code == 200
        for thread in threads:
            thread.join(20)
        assert [results[i][-1]["generated_text"] for i in range(6)] == [text] * 6
        for i in (6, 7):
            *chunks, done = results[i]
            assert done == "[DONE]"
            for choice in (0, 1):
                its = [c["choices"][0]["delta"].get("content", "") for c in chunks
                       if c["choices"] and c["choices"][0]["index"] == choice]  # fmt: skip
                assert "".join(its) == text
        assert [results[i] for i in (8, 9)] == [text] * 2
        assert server.metric("tokenmill_resumed_requests_total") > 2
        receipts = [results[i][-2]["receipt"] for i in (6, 7)]
        assert all(receipt["engines"] == [0] for receipt in receipts)
        assert any(receipt["resumed"] for receipt in receipts)
        assert server.metric("tgi_request_success") == 10
        eventually(lambda: server.metric('tokenmill_engine_up{engine="1"}') == 1)
        assert httpx.get(server.url + "/info").json()["max_batch_total_tokens"] == server.metric(
            "tgi_batch_max_total_tokens"
        )
    finally:
        assert "Traceback" not in server.stop()


SCHEMA = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 6},
                   "count": {"type": "integer"}},
    "required": ["names", "count"], "additionalProperties": False,
}  # fmt: skip
FREE = {"max_tokens": 90, "ignore_eos": True}
ASKED: list[dict[str, Any]] = [
    {**FREE, "temperature": 0},
    {**FREE, "temperature": 0.9, "top_p": 0.9, "seed": 7, "frequency_penalty": 0.7, "presence_penalty": 0.4},
    {**FREE, "temperature": 0.8, "seed": 3, "logprobs": True, "top_logprobs": 2},
    {"max_tokens": 150, "temperature": 0.7, "seed": 5,
     "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
]  # fmt: skip


@pytest.mark.slow
def test_answers_of_the_embedded_model_are_the_same_if_an_engine_is_killed_under_them() -> None:
    """Greedy, sampled with penalties, with log-probabilities, and constrained: token for token."""
    options = ("--data-parallel-size", "2", "--cpu-threads", "1", "--memory-limit", "4GiB")
    server = Server("", unused_port(), *options, mock=False)
    try:
        eventually(lambda: server.metric('tokenmill_engine_up{engine="1"}') == 1, timeout_s=60)

        def answer(i: int) -> tuple[str, list[Any]]:
            words = ("river", "stone", "lamp", "garden", "paper", "cloud", "window", "music")[i]
            message = {"role": "user", "content": f"Tell a story of a {words} and name six people in it."}
            body = {"messages": [message], "stream": True, **ASKED[i % len(ASKED)]}
            events = server.events("/v1/chat/completions", body)
            choices = [c["choices"][0] for c in events[:-1] if c["choices"]]
            logprobs = [e["logprob"] for c in choices if c.get("logprobs") for e in c["logprobs"]["content"]]
            return "".join(c["delta"].get("content") or "" for c in choices), logprobs

        works = [lambda i=i: answer(i) for i in range(8)]  # type: ignore[misc]
        quiet = [work() for work in works]
        threads, results = side_by_side(works)
        eventually(lambda: running(server, 0) + running(server, 1) >= 4, timeout_s=20)  # some may be over already
        victim = 0 if running(server, 0) > running(server, 1) else 1
        decoded = f'tokenmill_decode_tokens_total{{engine="{victim}"}}'
        before = server.metric(decoded)
        eventually(lambda: server.metric(decoded) > before + 10, timeout_s=30)
        engines_of(server)[victim].kill()
        for thread in threads:
            thread.join(60)
        assert server.metric("tokenmill_resumed_requests_total") > 0
        for i, (text, logprobs) in enumerate(quiet):
            assert results[i][0] == text, ASKED[i % len(ASKED)]
            assert results[i][1] == pytest.approx(logprobs, abs=1e-3)
    finally:
        server.stop()
