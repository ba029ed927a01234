"""A CPU is served without torch. Here torch cannot be imported, on whatever machine the tests run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support_ports import unused_port
from support_server import ROOT, Server

from tokenmill import LLM, extras
from tokenmill.backends.cpu import isa
from tokenmill.errors import StartError


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder for PYTHONPATH with a torch that ends any process importing it."""
    folder = tmp_path_factory.mktemp("poison")
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
    return str(folder)


@pytest.fixture(scope="module")
def server(embedded_model: Path, poisoned: str) -> Iterator[Server]:
    port = unused_port()
    running = Server(embedded_model, port, "--max-total-tokens", "512", mock=False, python_path=poisoned)
    yield running
    running.stop()


def run(*words: str, python_path: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [python_path, str(ROOT)]))
    command, environment = [sys.executable, "-m", "tokenmill", *words], os.environ | {"PYTHONPATH": path} | environ
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def ask(server: Server) -> str:
    """Return the continuation of a prompt that leaves no doubt."""
    body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 8}}
    text: str = server.post("/generate", body).json()["generated_text"]
    return text


def test_the_embedded_model_is_served_though_torch_cannot_be_imported(server: Server) -> None:
    assert "Paris" in ask(server)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_process_of_the_server_has_torchs_library_in_its_memory(server: Server) -> None:
    ask(server)
    for pid in server.children().values():
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_generate_answers_though_torch_cannot_be_imported(poisoned: str, embedded_model: Path) -> None:
    done = run("generate", "--raw", "--max-new-tokens", "8", "The capital of France is", python_path=poisoned)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout


@pytest.mark.slow
def test_ranks_share_the_model_though_torch_cannot_be_imported(embedded_model: Path, poisoned: str) -> None:
    words = "--num-shard", "2", "--share-devices", "--max-total-tokens", "512"
    server = Server(embedded_model, unused_port(), *words, mock=False, python_path=poisoned)
    try:
        assert "Paris" in ask(server)
        grammar = {"type": "regex", "value": "[0-9]{3}-[a-z]{2}"}
        body = {"inputs": "A number:", "parameters": {"max_new_tokens": 16, "grammar": grammar}}
        assert re.fullmatch("[0-9]{3}-[a-z]{2}", server.post("/generate", body).json()["generated_text"])
        assert not [name for name in os.listdir("/dev/shm") if name.startswith("tokenmill-ranks")]
    finally:
        server.stop()


@pytest.mark.parametrize("words, environ, said", [
    ([], {"TOKENMILL_ISA": "sse9"}, "ArgumentValidation: TOKENMILL_ISA='sse9' is no instruction set"),
    (["--cpu-threads", "4096"], {}, "ArgumentValidation: `cpu_threads` is 4096, but this process may use"),
    (["--memory-limit", "20MB"], {}, "ShardCannotStart: The model's weights need"),
])  # fmt: skip
def test_what_cannot_work_ends_the_start_with_one_line(
    words: list[str], environ: dict[str, str], said: str, embedded_model: Path
) -> None:
    done = run("serve", "--hostname", "127.0.0.1", "--port", "0", *words, **environ)
    assert done.returncode == 1
    assert f"Error: {said}" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_cpu_without_kernels_and_without_torch_is_refused_with_both_cures(
    embedded_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isa, "features", lambda: frozenset({"sse2"}))
    monkeypatch.setattr(extras, "has_torch", lambda: False)
    with pytest.raises(StartError, match=r"not written for this processor.*needs torch, which is not installed"):
        LLM(str(embedded_model))
