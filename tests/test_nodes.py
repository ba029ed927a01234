"""A server of two nodes as processes of one machine: what a lost node, and one that does not fit, do to it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support_ports import unused_port
from support_server import TEXT, Server, byte_model, eventually

Start = Callable[..., Server]


def three_ports() -> int:
    """Return the first of three free ports in a row."""
    while True:
        first = unused_port()
        try:
            with socket.create_server(("127.0.0.1", first + 1)), socket.create_server(("127.0.0.1", first + 2)):
                return first
        except OSError:
            continue


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a node of two, given its number and more options."""
    secret, model, first = tmp_path / "secret", byte_model(tmp_path), three_ports()
    secret.write_text("a secret of more than sixteen bytes")
    servers: list[Server] = []

    def started(node: int, *options: str) -> Server:
        words = ["--num-shard", "2", "--num-nodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1"]
        words += ["--master-port", str(first), "--cluster-secret-file", str(secret), *options]
        servers.append(Server(model, unused_port(), *words, wait=False))
        return servers[-1]

    yield started
    for server in servers:
        server.stop()


def ranks_of(server: Server) -> list[psutil.Process]:
    """Return the processes of a node's ranks."""
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "runtime.worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_lost_node_ends_its_requests_and_serves_again_when_it_is_back(start: Start) -> None:
    slow = ("--mock-step-ms", "20", "--mock-text", TEXT)
    server, other = start(0, *slow), start(1, *slow)
    server.wait_until_ready()
    body = {"inputs": "x", "parameters": {"max_new_tokens": 500}}
    events: list[Any] = []

    def read() -> None:
        with httpx.stream("POST", server.url + "/generate_stream", json=body, timeout=30) as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    events.append(json.loads(line[5:]))

    reader = threading.Thread(target=read)
    reader.start()
    eventually(lambda: len(events) > 3)
    other.process.kill()
    reader.join(10)
    assert not reader.is_alive()
    assert events[-1]["error_type"] == "generation"

    other = start(1, *slow)
    server.wait_until_ready()
    answer = server.post("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 9}})
    assert answer.json()["generated_text"] == TEXT[:8], "one letter has two bytes"

    assert len(ranks_of(other)) == 1
    server.process.kill()
    eventually(lambda: not ranks_of(other))
    assert other.process.poll() is None, "the agent waits for node 0"
    assert "node 0" in other.stop().lower()
    assert other.process.returncode == 0


@pytest.mark.slow
def test_nodes_that_differ_end_with_what_differs(start: Start) -> None:
    server, other = start(0), start(1, "--max-batch-size", "7")
    assert server.process.wait(30) == 1
    assert "Rank 1 differs from rank 0: --max-batch-size is 7 there" in server.log()
    assert "Traceback" not in other.stop()


@pytest.mark.slow
def test_a_node_that_does_not_join_is_named(start: Start) -> None:
    server = start(0, "--rank-timeout", "2")
    assert server.process.wait(30) == 1
    assert "Node 1 did not join within 2 s (--rank-timeout)" in server.log()


@pytest.mark.slow
def test_a_node_of_another_number_of_nodes_is_refused_on_both(start: Start) -> None:
    server, other = start(0), start(1, "--num-nodes", "3", "--num-shard", "3")
    assert (server.process.wait(30), other.process.wait(30)) == (1, 1)
    for log in (server.log(), other.log()):
        assert "Node 1 of 3 has joined as node 1 of 2" in log
