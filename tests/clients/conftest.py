"""One server with the embedded model, which all clients ask; or the one at TOKENMILL_URL, which runs already.

These tests need nothing of tokenmill in their own environment: TOKENMILL_PYTHON names the interpreter that runs the
server (this one, if it is not set). So clients whose requirements fight with others' have an environment of their own.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests share few cores
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no list of prices is fetched
os.environ["LANGSMITH_TRACING"] = "false"

import pytest
from support_server import Server

SERVER_PYTHON = os.environ.get("TOKENMILL_PYTHON", sys.executable)


def start(*options: str) -> Server:
    """A server with the embedded model on a free port."""
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
    """Where the server answers: TGI's routes."""
    if running := os.environ.get("TOKENMILL_URL"):
        yield running.rstrip("/")
        return
    server = start()
    yield server.url
    server.stop()


@pytest.fixture
def v1(url: str) -> str:
    """Where OpenAI's routes begin."""
    return url + "/v1"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests keep huggingface_hub from using any network, even this machine's own."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    if hasattr(_http, "reset_sessions"):  # until huggingface_hub 1.0; sessions remember that they were offline
        _http.reset_sessions()
