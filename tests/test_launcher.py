"""The supervisor and real processes (mock engine): start, deaths, drain; no process is left behind."""

from __future__ import annotations

import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support_ports import unused_port
from support_server import byte_model

import tokenmill
from tokenmill import rundir
from tokenmill.config import Settings
from tokenmill.errors import AddressInUse, StartError
from tokenmill.listening import listen, place
from tokenmill.ranks import Restarts
from tokenmill.readiness import readiness
from tokenmill.wire.control import ChildControl, ParentControl, ParentGoneError
from tokenmill.wire.messages import Configure, Drain, EngineInfo, Failed, ModelReady, Phase, Progress


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("model"))


class Server:
    """`tokenmill serve` on a free port, with its output."""

    def __init__(self, model: Path, *argv: str, **environ: str) -> None:
        self.port = unused_port()
        command = [sys.executable, "-m", "tokenmill", "serve", "--mock", "--model-id", str(model), "--port",
                   str(self.port), "--hostname", "127.0.0.1", *argv]  # fmt: skip
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environ}
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def stream(self, tokens: int) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = {"inputs": "hello", "parameters": {"max_new_tokens": tokens}}
        connection.request("POST", "/generate_stream", json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def wait_ready(self) -> None:
        until(lambda: self.process.poll() is not None or self.get("/health")[0] == 200)
        assert self.process.poll() is None, self.output

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, what: str) -> psutil.Process:
        return next(child for child in self.children() if what in " ".join(child.cmdline()))

    def wait(self, seconds: float = 20) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            children = self.children()
            self.process.kill()
            self.process.wait()
            psutil.wait_procs(children, 5)


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def serve(model: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*argv: str, **environ: str) -> Server:
        servers.append(Server(model, *argv, **environ))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_server_from_its_start_to_its_end(serve: Callable[..., Server], model: Path) -> None:
    server = serve("--http-workers", "2")
    statuses: list[int] = []
    until(lambda: (statuses.append(server.get("/health")[0]), statuses[-1] == 200)[1])  # type: ignore[func-returns-value]
    assert set(statuses) <= {0, 503, 200}
    assert 503 in statuses  # the port answered before the engine was there
    until(lambda: "Ready in" in server.output)
    assert f"Model {model}" in server.output
    assert f"at http://127.0.0.1:{server.port}; the KV cache holds" in server.output
    assert f"curl http://127.0.0.1:{server.port}/v1/chat/completions" in server.output
    waited_for = ("Setting max batch total tokens to ", "Maximum total tokens defaulted to ", "Connected\n")  # as TGI's
    assert all(words in server.output for words in waited_for)
    children = server.children()
    assert len(children) == 3
    server.process.terminate()
    assert server.wait() == 0
    assert not psutil.wait_procs(children, 3)[1]


def test_killing_the_supervisor_leaves_no_process_behind(serve: Callable[..., Server]) -> None:
    server = serve()
    server.wait_ready()
    children = server.children()
    assert len(children) == 2
    server.process.kill()
    assert not psutil.wait_procs(children, 3)[1]


def test_a_dead_engine_is_restarted_and_its_streams_end_with_an_error(serve: Callable[..., Server]) -> None:
    server = serve("--mock-step-ms", "50", "--mock-text", "hello " * 100)
    server.wait_ready()
    stream = server.stream(500)
    assert stream.readline().startswith(b"data:")
    server.child("runtime.worker").kill()
    rest = stream.read()
    assert b'"error_type"' in rest  # the stream ended in order
    until(lambda: server.get("/health")[0] == 200)
    assert b"generated_text" in server.stream(2).read()
    assert "killed by SIGKILL" in server.output
    until(lambda: "The engine is ready again after 1 restart" in server.output)


def test_a_dead_http_worker_is_restarted_on_the_same_port(serve: Callable[..., Server]) -> None:
    server = serve()
    server.wait_ready()
    worker = server.child("server.worker")
    worker.kill()
    until(lambda: server.get("/health")[0] == 200)
    assert server.child("server.worker").pid != worker.pid
    assert "The HTTP worker 0 has died" in server.output


def test_an_engine_that_dies_too_often_ends_the_server(serve: Callable[..., Server]) -> None:
    server = serve("--max-engine-restarts", "0")
    server.wait_ready()
    server.child("runtime.worker").kill()
    assert server.wait() == 1
    assert "Error: ShardFailed: The engine rank 0 has died" in server.output


def ranks_of(server: Server) -> list[psutil.Process]:
    """Return the processes of all ranks, in the order of their start."""
    ranks = [child for child in server.children() if "runtime.worker" in " ".join(child.cmdline())]
    return sorted(ranks, key=lambda rank: rank.pid)


def test_a_dead_rank_ends_its_engine_alone_and_is_named(serve: Callable[..., Server]) -> None:
    server = serve("--data-parallel-size", "2", "--num-shard", "2", "--max-engine-restarts", "1")
    server.wait_ready()
    until(lambda: "Ready in" in server.output)
    assert "2 engines of 2 ranks) at" in server.output
    zero, one = ranks_of(server)[:2], ranks_of(server)[2:]
    assert len(one) == 2
    one[1].kill()
    assert not psutil.wait_procs(one, 5)[1]  # both ranks of the group
    until(lambda: "The rank 1 of engine 1 has died (killed by SIGKILL" in server.output)
    assert server.get("/health")[0] == 200  # engine 0 serves
    assert b"generated_text" in server.stream(2).read()
    until(lambda: "Engine 1 is ready again after 1 restart" in server.output)
    assert ranks_of(server)[:2] == zero
    assert len(ranks_of(server)) == 4
    children = server.children()
    server.process.terminate()
    assert server.wait() == 0
    assert not psutil.wait_procs(children, 3)[1]


def test_a_rank_that_hangs_ends_its_engine_with_a_line_that_says_where_it_stood(serve: Callable[..., Server]) -> None:
    server = serve("--num-shard", "2", "--mock-fault", "hang@25:1", "--mock-step-ms", "50", "--mock-text", "hi " * 99)
    server.wait_ready()
    ranks = ranks_of(server)
    stream = server.stream(500)
    began = time.monotonic()
    assert b'"error_type"' in stream.read()
    assert time.monotonic() - began < 10  # 3 s, and what a busy machine takes
    assert not psutil.wait_procs(ranks, 3)[1]
    until(lambda: "the engine is started again in 1 s" in server.output)
    [line] = [line for line in server.lines if "has died" in line]
    assert "The engine rank 1 has died (hung: no progress for " in line
    assert " s; it stood at step 25 (1 rows, 1 tokens), collect (runtime/mock.py:" in line
    assert "Stack of engine rank 0:" in server.output
    until(lambda: server.get("/health")[0] == 200)


@pytest.mark.slow
def test_a_stopped_rank_ends_its_engine_and_is_named(serve: Callable[..., Server]) -> None:
    server = serve("--num-shard", "2")
    server.wait_ready()
    ranks_of(server)[0].suspend()
    until(lambda: "has died" in server.output)
    assert "The engine rank 0 has died (hung: no progress for " in server.output
    assert "stopped by a signal (SIGSTOP or SIGTSTP)" in server.output
    until(lambda: "is ready again" in server.output)


@pytest.mark.slow
def test_ranks_that_plan_other_steps_end_their_engine(serve: Callable[..., Server]) -> None:
    server = serve("--num-shard", "2", "--debug-plans", "--mock-fault", "nan@6:1", "--mock-text", "hello " * 99)
    server.wait_ready()
    assert b'"error_type"' in server.stream(500).read()
    until(lambda: "has died" in server.output)
    [line] = [line for line in server.lines if "has died" in line]
    assert "The engine rank 1 has died (RanksDiverged: rank 1 planned another step than rank 0; it stood at " in line


GENERATE = ("POST", "/generate", b'{"inputs": "hello"}')
CHAT = ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "hello"}], "stream": true}')


def ask(connection: http.client.HTTPConnection, call: tuple[str, str, bytes]) -> tuple[int, dict[str, str], Any]:
    method, path, body = call
    connection.request(method, path, body or None, {"Content-Type": "application/json"} if body else {})
    response = connection.getresponse()
    text = response.read()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, json.loads(text or b"null")


def test_after_sigterm_streams_finish_and_new_requests_are_refused_with_the_time_to_come_back(
    serve: Callable[..., Server],
) -> None:
    server = serve("--mock-step-ms", "30", "--http-workers", "2")
    server.wait_ready()
    kept = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=10) for _ in range(6)]  # each worker gets some
    for connection in kept:
        until(lambda kept=connection: ask(kept, ("GET", "/info", b""))[0] == 200)  # the other worker may be ready later
    stream = server.stream(60)
    assert stream.readline().startswith(b"data:")
    for process in (*server.children(), psutil.Process(server.process.pid)):  # as systemd and batch systems do
        process.terminate()
    until(lambda: server.get("/health")[0] == 503)
    fresh = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=10) for _ in range(4)]
    health = (("GET", path, b"") for path in ("/health", "/ping", "/v2/health/ready"))
    calls = [GENERATE, CHAT, GENERATE, CHAT, ("GET", "/v1/models", b""), ("GET", "/info", b""), GENERATE, *health]
    for connection, call in zip([*kept, *fresh], calls, strict=True):
        status, headers, answer = ask(connection, call)
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close"), call
        if call[1].startswith("/v1"):
            assert answer["error"] == {"message": "the server is shutting down", "type": "service_unavailable_error",
                                       "param": None, "code": None}  # fmt: skip
        elif not call[1].startswith("/v2"):
            assert answer == {"error": "the server is shutting down", "error_type": "healthcheck"}
    assert ask(http.client.HTTPConnection("127.0.0.1", server.port), ("GET", "/v2/health/live", b""))[0] == 200
    rest = stream.read()
    assert b"generated_text" in rest.splitlines()[-2] + rest.splitlines()[-1]
    assert b"error" not in rest
    assert server.wait() == 0
    assert "ERROR" not in server.output


def test_what_does_not_finish_in_time_ends_with_an_error(serve: Callable[..., Server]) -> None:
    server = serve("--mock-step-ms", "100", "--mock-text", "hello " * 100, "--graceful-termination-timeout", "1")
    server.wait_ready()
    stream = server.stream(500)
    assert stream.readline().startswith(b"data:")
    server.process.send_signal(signal.SIGHUP)  # a closing terminal sends it, possibly twice
    server.process.send_signal(signal.SIGHUP)
    assert b'"error":"the server is shutting down"' in stream.read()
    assert server.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGKILL])
def test_a_signal_leaves_no_process_behind_while_a_stream_runs(number: int, serve: Callable[..., Server]) -> None:
    server = serve("--mock-step-ms", "100", "--mock-text", "hello " * 100)
    server.wait_ready()
    assert server.stream(500).readline().startswith(b"data:")
    children = server.children()
    assert len(children) >= 2
    server.process.send_signal(number)
    assert server.wait() == (0 if number == signal.SIGQUIT else -signal.SIGKILL)
    assert not psutil.wait_procs(children, 3)[1]


def test_a_hang_up_that_nohup_has_turned_off_ends_nothing(model: Path) -> None:
    run = "import signal, sys; from tokenmill.launcher import _wakeup; import os, time\n"
    run += "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    run += "with _wakeup() as wakeup:\n os.kill(os.getpid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGTERM)\n"
    run += " time.sleep(0.1); print(list(wakeup.recv(64)))"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert done.stdout == f"[{int(signal.SIGTERM)}]\n"


def test_a_second_signal_stops_at_once(serve: Callable[..., Server]) -> None:
    server = serve("--mock-step-ms", "500", "--mock-text", "hello " * 100)
    server.wait_ready()
    stream = server.stream(100)
    assert stream.readline().startswith(b"data:")
    server.process.send_signal(signal.SIGINT)
    until(lambda: "Stopping" in server.output)
    time.sleep(0.2)
    assert server.process.poll() is None
    began = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 0
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_during_the_start_stops_at_once(number: int, serve: Callable[..., Server], run_dir: Path) -> None:
    server = serve(TMPDIR=str(run_dir))
    until(lambda: len(server.children()) == 2)
    assert len(list(run_dir.glob("tokenmill-*"))) == 1
    children = server.children()
    server.process.send_signal(number)
    assert server.wait() == 0
    assert not psutil.wait_procs(children, 3)[1]
    assert not list(run_dir.iterdir())


def test_a_taken_port_is_found_before_anything_else(model: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "tokenmill", "serve", "--model-id", str(model), "--mock", "--port", str(port),
                   "--hostname", "127.0.0.1"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: WebserverCannotStart: Port {port} of 127.0.0.1 is in use")
    assert "--port" in done.stderr


@pytest.mark.parametrize("files", [10, 16])  # the supervisor, or a child, reaches the limit first
def test_too_few_open_files_are_named_with_the_cure(files: int, model: Path) -> None:
    command = f'ulimit -n {files}; exec "$0" -m tokenmill serve --mock --port 0 --model-id "$1"'
    done = subprocess.run(["bash", "-c", command, sys.executable, str(model)], capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 1
    assert f"No more files can be opened: the limit is {files}. Raise it (`ulimit -n`" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_what_a_rank_cannot_do_reaches_the_user_in_its_words(serve: Callable[..., Server]) -> None:
    server = serve("--mock-fault", "explode@now")
    assert server.wait() == 1
    assert "Error: ArgumentValidation: The mock fault 'explode@now' is not understood" in server.output
    assert "Traceback" not in server.output


def test_a_model_that_cannot_be_served_ends_the_start(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = Server(tmp_path)
    assert server.wait() == 1
    assert "has no weights to serve" in server.output
    assert "Traceback" not in server.output


def test_what_is_odd_about_the_options_is_said_at_the_start(serve: Callable[..., Server]) -> None:
    server = serve("--log-level", "info,loud", "--master-addr", "there", "--port", "99999999")
    assert server.wait() == 2
    server = serve("--log-level", "info,loud", "--master-addr", "there", "--mock-fault", "nonsense", "--env")
    assert server.wait() == 1
    assert f"Runtime environment:\ntokenmill: {tokenmill.__version__}\n" in server.output
    assert "WARN tokenmill.launcher: `--master-addr` has no effect" in server.output
    assert "WARN tokenmill.launcher: `LOG_LEVEL`: 'loud' is not understood" in server.output


def test_restarts_wait_longer_and_longer_and_are_forgotten_after_ten_minutes() -> None:
    restarts = Restarts(8)
    assert [restarts.delay(float(now)) for now in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert restarts.delay(8.0) is None
    assert restarts.delay(700.0) == 1


def test_the_readiness_line_counts_requests_of_full_length() -> None:
    info = EngineInfo("m", "float32", "cpu", "torch", num_blocks=100, block_size=16, vocab_size=9, max_input_tokens=499,
                      max_total_tokens=500, max_batch_tokens=512, max_batch_size=128, num_shard=2)  # fmt: skip
    line, curl = readiness([info], Settings.from_args(["--api-key", "secret", "--num-shard", "2"], {}), 1.25)
    assert "m (float32, torch on cpu, 2 ranks) at http://127.0.0.1:3000" in line
    assert "holds 1,600 tokens, 3 requests of the full 500 tokens" in line
    assert "secret" not in curl
    assert "$API_KEY" in curl


@pytest.mark.parametrize("hostname, url", [
    ("::1", "http://[::1]:3000"), ("::", "http://[::1]:3000"), ("0.0.0.0", "http://127.0.0.1:3000"),
    ("fe80::1%eth0", "http://[fe80::1%25eth0]:3000"), ("my-machine", "http://my-machine:3000"),
])  # fmt: skip
def test_the_url_to_paste_is_one(hostname: str, url: str) -> None:
    info = EngineInfo("m", "float32", "cpu", "torch", num_blocks=100, block_size=16, vocab_size=9, max_input_tokens=499,
                      max_total_tokens=500, max_batch_tokens=512, max_batch_size=128)  # fmt: skip
    line, curl = readiness([info], Settings.from_args(["--hostname", hostname], {}), 1.25)
    assert f" at {url};" in line
    assert f"curl {url}/v1/chat/completions " in curl


@pytest.mark.parametrize("hostname, address", [("::1", "::1"), ("localhost", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"),
                                               ("0", "0.0.0.0")])  # fmt: skip
def test_an_address_or_a_name_is_listened_on(hostname: str, address: str) -> None:
    with listen(hostname, 0) as listener:
        assert listener.getsockname()[0] == address


@pytest.mark.parametrize("hostname, words", [
    ("no-such-name.invalid", "neither an address nor a name that is known here .* 0.0.0.0 means all"),
    ("192.0.2.1", r"Cannot listen on 192\.0\.2\.1:0: .*this machine has no such address"),
    ("2001:db8::1", r"Cannot listen on \[2001:db8::1\]:0: "), ("x" * 70, "neither an address nor a name"),
    ("http://here", "neither an address nor a name"),
])  # fmt: skip
def test_what_cannot_be_listened_on_is_explained(hostname: str, words: str) -> None:
    with pytest.raises(AddressInUse, match=words):
        listen(hostname, 0)


def test_a_taken_port_of_an_ipv6_address_is_named_with_brackets() -> None:
    with listen("::1", 0) as taken, pytest.raises(AddressInUse, match=r"Port \d+ of \[::1\] is in use"):
        listen("::1", taken.getsockname()[1])
    assert place("::1", 80) == "[::1]:80"


def test_a_run_folder_is_where_a_socket_can_be(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = run_dir / ("x" * 190)
    deep.mkdir()
    (run_dir / ("ü" * 40)).mkdir()
    for folder in (deep, run_dir / ("ü" * 40), run_dir / "missing", run_dir):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with rundir.run_dir() as ours, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{ours}/engine.sock")
            assert (Path(ours).parent == folder) == (folder == run_dir)
            assert Path(ours).stat().st_mode & 0o777 == 0o700
        assert not Path(ours).exists()


def test_no_place_for_a_run_folder_is_explained(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(run_dir / "missing"))
    monkeypatch.setattr(rundir, "_SHORT", (str(run_dir / "none"),))
    with (
        pytest.raises(StartError, match=r"missing: No such file or directory; .*/none: .* Set TMPDIR"),
        rundir.run_dir(),
    ):
        pass


def test_a_run_folder_on_a_file_system_without_locks_is_not_taken_for_abandoned(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(tempfile, "tempdir", str(run_dir))
    with monkeypatch.context() as without_locks:
        without_locks.setattr(rundir.fcntl, "flock", refuses)
        manager = rundir.run_dir()
        ours = manager.__enter__()
    rundir.remove_abandoned()
    assert Path(ours).is_dir()
    manager.__exit__(None, None, None)
    assert not Path(ours).exists()


def test_the_folder_of_a_killed_server_is_removed_by_the_next_and_that_of_a_living_one_is_not(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(run_dir))
    hold = "import sys, tokenmill.rundir as r\nwith r.run_dir() as d: print(d, flush=True); sys.stdin.read()"
    environ = {**os.environ, "TMPDIR": str(run_dir)}
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
    assert holder.stdout is not None
    held = Path(holder.stdout.readline().decode().strip())
    with rundir.run_dir() as ours:
        assert held.is_dir()
        assert Path(ours).stat().st_mode & 0o777 == 0o700
    assert not Path(ours).exists()
    holder.kill()
    holder.wait()
    assert held.is_dir()
    rundir.remove_abandoned()
    assert not held.exists()


# The control pipes


def pipes() -> tuple[ParentControl, Callable[[], ChildControl]]:
    child_reads, we_write = os.pipe()
    we_read, child_writes = os.pipe()
    return ParentControl(we_read, we_write), lambda: ChildControl(child_reads, child_writes)


CONFIGURE = Configure(settings={"port": 1}, index=0, engine_addresses=("a",), run_dir="b")


def test_a_child_waits_for_the_model_and_keeps_what_came_before() -> None:
    parent, connect = pipes()
    for message in (CONFIGURE, Phase("download"), ModelReady({"path": "p"}), Drain(3.0)):
        parent.send(message)
    child = connect()
    assert child.configure == CONFIGURE
    assert child.wait_model() == {"path": "p"}
    assert child.poll() == [Phase("download"), Drain(3.0)]
    assert child.poll() == []
    child.send(Progress("load", 1, 2))
    child.send(Failed("x", "y"))
    assert parent.poll() == [Progress("load", 1, 2), Failed("x", "y")]
    assert not parent.closed
    child.close()
    assert parent.poll() == []
    assert parent.closed
    parent.send(Phase("nobody hears this"))


def test_a_child_learns_that_its_supervisor_has_died() -> None:
    parent, connect = pipes()
    parent.send(CONFIGURE)
    child = connect()
    parent.close()
    assert child.poll() is None
    with pytest.raises(ParentGoneError):
        child.wait_model()


def test_a_child_that_does_not_read_never_blocks_its_supervisor() -> None:
    parent, connect = pipes()
    parent.send(CONFIGURE)
    phases = [Phase("x" * 1000, number) for number in range(300)]  # more than a pipe holds
    for phase in phases:
        parent.send(phase)
    child = connect()
    got = []
    while len(got) < len(phases):
        got += child.poll() or []
        parent.send(Phase("more"))
    assert got[: len(phases)] == phases
