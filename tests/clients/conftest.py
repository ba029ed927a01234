"""One server with the embedded model for all clients; or the running one at TOKENMILL_URL.

These tests need nothing of tokenmill in their own environment: TOKENMILL_PYTHON names the interpreter that runs the
server (default: this one). So clients with conflicting requirements can have an environment of their own.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests share few cores
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # do not download a list of prices
os.environ["LANGSMITH_TRACING"] = "false"

import pytest
from support_server import Server

SERVER_PYTHON = os.environ.get("TOKENMILL_PYTHON", sys.executable)


def start(*options: str) -> Server:
    """Start a server with the embedded model on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = Server("", port, *options, mock=False, wait=False, python=SERVER_PYTHON)
    try:
        running.wait_until_ready(300)  # the first start may fetch the model
    except BaseException:
        running.process.kill()
        raise
    return running


@pytest.fixture(scope="package")
def url() -> Iterator[str]:
    """Return the address of the server: TGI's routes."""
    if running := os.environ.get("TOKENMILL_URL"):
        yield running.rstrip("/")
        return
    server = start()
    yield server.url
    server.stop()


@pytest.fixture
def v1(url: str) -> str:
    """Return the base address of OpenAI's routes."""
    return url + "/v1"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow huggingface_hub to use the network: the other tests forbid it, even on this machine."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    if hasattr(_http, "reset_sessions"):  # before huggingface_hub 1.0, sessions stay offline
        _http.reset_sessions()
