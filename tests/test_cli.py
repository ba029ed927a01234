"""The commands, as users type them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import tokenmill
from tokenmill import chat, cli
from tokenmill.config import Settings
from tokenmill.progress import Lines, amount
from tokenmill.server.openapi import BODIES
from tokenmill.server.routes.table import ROUTES
from tokenmill.wire.messages import Progress


def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenmill", *words]
    env = {**os.environ, **environ}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    for command in ("serve", "chat", "generate", "download-weights", "env", "doctor", "schema"):
        assert f"\n  {command} " in shown


def test_a_misspelt_command_is_a_usage_error_with_a_guess(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["srve"]) == 2
    assert "did you mean `tokenmill serve`?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "chat", "generate", "download-weights", "env", "doctor", "schema"])
def test_every_command_has_help(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: tokenmill {command}")


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert cli.text_generation_launcher(["--version"]) == 0
    assert capsys.readouterr().out.count(tokenmill.__version__) == 2


def test_env_names_what_runs_here_and_no_secret() -> None:
    done = run("env", API_KEY="hunter2", HF_TOKEN="hf_secret")
    assert done.returncode == 0
    assert f"tokenmill: {tokenmill.__version__}" in done.stdout
    assert re.search(r"^torch: (2|not installed)", done.stdout, re.MULTILINE)
    assert re.search(r"^numba: \d", done.stdout, re.MULTILINE)
    assert "hunter2" not in done.stdout
    assert "hf_secret" not in done.stdout


def test_an_error_is_one_line_with_its_kind(tmp_path: Path) -> None:
    done = run("serve", "--model-id", str(tmp_path / "nothing"), "--hostname", "127.0.0.1", "--port", "0")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: DownloadError: Model ")
    assert "Traceback" not in done.stderr + done.stdout


def test_an_option_that_a_later_release_brings_is_refused_with_exit_code_1() -> None:
    done = run("serve", "--speculate", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ArgumentValidation: `--speculate` cannot be used yet:")


def test_a_wrong_variable_and_a_wrong_option_are_usage_errors() -> None:
    done = run("serve", PORT="http")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ArgumentValidation: Environment variable PORT: 'http' is not a whole number")
    assert run("serve", "--port", "http").returncode == 2


@pytest.mark.parametrize("words", [
    ["MODEL", "--json-output", "--port", "3"], ["--json-output", "MODEL", "--port", "3"],
    ["--port", "3", "--json-output", "MODEL", "--uds-path", "/tmp/x", "--logger-level", "DEBUG"],
])  # fmt: skip
def test_the_shards_command_takes_its_model_anywhere(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []
    monkeypatch.setattr("tokenmill.launcher.serve", lambda settings, environment: served.append(settings) or 0)
    assert cli.text_generation_server(["serve", *words]) == 0
    (settings,) = served
    assert (settings.model_id, settings.port, settings.json_output) == ("MODEL", 3, True)
    assert settings.log_level == ("DEBUG" if "DEBUG" in words else "info")
    assert settings.otlp_service_name == "text-generation-inference.server"


def test_an_adapter_is_downloaded_with_its_base_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    about = json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"})
    files = (base, "config.json", "{}"), (base, "model.safetensors", ""), (adapter, "adapter_model.safetensors", "")
    for folder, name, content in (*files, (adapter, "adapter_config.json", about)):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    words = ["download-weights", str(adapter), "--no-auto-convert", "--logger-level", "INFO", "--json-output"]
    assert cli.text_generation_server(words) == cli.text_generation_server([*words, "--merge-lora"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(adapter)] * 2
    (base / "model.safetensors").unlink()
    assert cli.text_generation_server(words) == 1


def test_text_generation_server_knows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.text_generation_server(["quantize", "model", "folder", "--groupsize", "5"]) == 1
    assert "`groupsize` is 5; it must be -1 or a multiple of 8" in capsys.readouterr().err
    assert cli.text_generation_server(["quantise"]) == 2


def test_download_weights_prints_the_path_of_what_is_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert cli.text_generation_server(["download-weights", str(tmp_path), "--extension", ".safetensors"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"


def test_schema_prints_an_openapi_document_of_every_route() -> None:
    done = run("schema")
    document = json.loads(done.stdout)
    listed = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    for route in ROUTES:
        if route.path not in ("/docs", "/docs/*"):  # the way to /docs/, and its files
            start = route.path.removesuffix("*")
            assert any(method == route.method and path.startswith(start) for method, path in listed), route.path
    references = set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', done.stdout))
    assert references <= set(document["components"]["schemas"])
    assert "max_new_tokens" in document["components"]["schemas"]["GenerateParameters"]["properties"]
    taken = {key for key, (request, _, _) in BODIES.items() if request is not None}
    assert taken == {(route.method, route.path) for route in ROUTES if route.method == "POST"}


# chat


class _Api(BaseHTTPRequestHandler):
    """API whose answer is the number of messages that it received, in two pieces."""

    asked: list[bytes]

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(body)
        if b"refuse" in body:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no such thing"}}')
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may hang up
            for piece in ("mess", f"ages: {body.count(b'role')}"):
                self.wfile.write(b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % piece.encode())
            self.wfile.write(b": a comment\n\ndata: [DONE]\n\n")

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def api() -> chat.Conversation:
    _Api.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return chat.Conversation(f"http://127.0.0.1:{server.server_port}", "", {"max_tokens": 5})


def test_chat_sends_the_history_and_keeps_what_was_answered(api: chat.Conversation) -> None:
    assert list(api.say("hello")) == ["mess", "ages: 1"]
    assert "".join(api.say("again")) == "messages: 3"
    assert [message["role"] for message in api.messages] == ["user", "assistant"] * 2
    assert b'"max_tokens": 5' in _Api.asked[0]


def test_chat_keeps_what_it_got_of_an_answer_that_was_stopped(api: chat.Conversation) -> None:
    pieces = api.say("hello")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert api.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "mess"}]


def test_chat_forgets_a_message_that_was_refused(api: chat.Conversation) -> None:
    with pytest.raises(chat.ServerError, match="no such thing"):
        list(api.say("refuse"))
    assert api.messages == []


def test_chat_answers_the_last_message_again(api: chat.Conversation) -> None:
    list(api.say("hello"))
    assert api.take_back() == "hello"
    assert api.messages == []
    assert api.take_back() is None


# progress


def test_plain_progress_says_the_beginning_now_and_then_and_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    for done in range(101):
        lines.progress(Progress("download", done * 1_000_000, 100_000_000, detail="owner/model"))
    lines.every_s = 0.0
    lines.progress(Progress("load", 0, 100_000_000))
    lines.progress(Progress("load", 50_000_000, 100_000_000))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "Downloading owner/model …"
    assert shown[1].startswith("Downloading owner/model: 100.0 MB in 0.")
    assert shown[2] == "Loading …"
    assert shown[3].startswith("Loading: 50 % of 100.0 MB, ")
    assert shown[3].endswith(" s left")
    assert len(shown) == 4


@pytest.mark.parametrize("count, unit, text", [
    (5, "bytes", "5 B"), (1500, "bytes", "1.5 kB"), (96.3e6, "bytes", "96.3 MB"), (2e9, "bytes", "2.0 GB"),
    (12, "items", "12 items"),
])  # fmt: skip
def test_amounts_are_short(count: float, unit: str, text: str) -> None:
    assert amount(count, unit) == text
