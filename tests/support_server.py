"""A real server in processes of its own, with the mock engine and a byte-level tokenizer, for tests of HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import tokenizers
from support_ports import unused_port
from tokenizers import decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent
TEXT = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich."
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_model(folder: Path, template: str = TEMPLATE, special: Sequence[str] = ()) -> Path:
    """Write a model folder with a byte-level tokenizer and no weights.

    `</s>` is 0, `<s>` is 1; the bytes follow, then `special` further tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0, "<s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken("</s>", special=True), tokenizers.AddedToken("<s>", special=True)])
    inner.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special])
    inner.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
        "tokenizer_class": "PreTrainedTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = {"model_type": "llama", "eos_token_id": 0, "bos_token_id": 1, "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(model))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


class Server:
    """A running server. `url` is ready when the constructor returns, unless `wait` is false."""

    def __init__(
        self,
        model: Path | str,
        port: int,
        *options: str,
        mock: bool = True,
        wait: bool = True,
        python: str = sys.executable,
        python_path: str = "",
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        command = [python, "-m", "tokenmill", "serve", "--model-id", str(model), "--hostname", "127.0.0.1"]
        command += ["--port", str(port), *(["--mock"] if mock else []), *options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [python_path, str(ROOT)]))}
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  a pipe would fill up
        self.process = subprocess.Popen(command, env=environment, stdout=self._output, stderr=subprocess.STDOUT)
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {self.log()}")
            try:
                if httpx.get(self.url + "/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise TimeoutError("the server did not become ready")

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **more)

    def events(self, path: str, body: Any) -> list[Any]:
        """Return the decoded events of a stream. "[DONE]" stays a string."""
        with httpx.stream("POST", self.url + path, json=body, timeout=30) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"] == "text/event-stream"
            text = "".join(response.iter_text())
        blocks = [block for block in text.split("\n\n") if block]
        assert all(block.startswith("data: ") for block in blocks)
        return [b if (b := block.removeprefix("data: ")) == "[DONE]" else json.loads(b) for block in blocks]

    def metric(self, name: str) -> float:
        """Return the value of one line in /metrics. `name`: with labels."""
        for line in httpx.get(self.url + "/metrics", timeout=5).text.splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)

    def children(self) -> dict[str, int]:
        """Return process ids of the supervisor's children by their role: "server" and "runtime"."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
                command = (folder / "cmdline").read_text()
            except OSError:
                continue
            if int(parent) == self.process.pid and "tokenmill.child" in command:
                found["runtime" if "runtime" in command else "server"] = int(folder.name)
        return found

    def log(self) -> str:
        """Return the output once the server has ended. Raise TimeoutExpired after 30 s."""
        self.process.wait(30)
        self._output.seek(0)
        return self._output.read()

    def stop(self) -> str:
        """End the server now and return its log."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.send_signal(signal.SIGINT)
        try:
            return self.log()
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.log()


@contextmanager
def scripted(
    folder: Path,
    *options: str,
    step_ms: int = 1,
    text: str = TEXT,
    template: str = TEMPLATE,
    special: Sequence[str] = (),
    total: int = 500,
) -> Iterator[Server]:
    """Run a server for the model in `folder` whose engine answers `text`, a byte every `step_ms`.

    The server ends with the block.
    """
    told = ("--mock-text", text, "--mock-step-ms", str(step_ms), "--max-total-tokens", str(total))
    running = Server(byte_model(folder, template, special), unused_port(), *told, *options)
    try:
        yield running
    finally:
        running.stop()


def eventually(condition: Any, timeout_s: float = 10.0) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
