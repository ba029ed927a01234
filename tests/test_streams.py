"""stdout and stderr that are closed, full, of a small encoding, or without a reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from select import poll
from typing import ClassVar

import pytest

from tokenmill import streams
from tokenmill.streams import _Outlet

FULL = "/dev/full"


def shell(redirection: str, code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run Python code under a shell's redirections."""
    command = f'"$0" -c "$1" {redirection}'
    env = {**os.environ, **environ}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, sys.executable, code],
        capture_output=True, encoding="latin-1", env=env, timeout=60, check=False,
    )  # fmt: skip


SERVES = """
import os, sys
from tokenmill import logs, streams
streams.install(lossy=True)
logs.set_up()
import logging
for _ in range(100):
    print('loading …', 'x' * 1000)
    logging.getLogger('tokenmill').warning('µs')
    print('trouble', file=sys.stderr)
file = open('/dev/null')
assert file.fileno() > 2, 'a file is where an output was'
os.write(int(os.environ['DONE']), b'done')
"""


@pytest.mark.parametrize("redirection", [
    ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", f">{FULL}", f"2>{FULL}", f">{FULL} 2>&1", "| true", "2>&1 | true",
    "| head -n 1", "> >(sleep 0)",
])  # fmt: skip
def test_a_server_goes_on_whatever_its_outputs_are(redirection: str) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    code = SERVES.replace("int(os.environ['DONE'])", str(write))
    command = f'"$0" -c "$1" {redirection}'
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command, sys.executable, code], pass_fds=[write],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=60)  # fmt: skip
    os.close(write)
    assert (done.returncode, os.read(read, 9)) == (0, b"done"), done.stderr
    os.close(read)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_that_lines_are_lost_is_told_once_where_it_can_be() -> None:
    done = shell(f">{FULL}", SERVES.replace("int(os.environ['DONE'])", "2"))
    assert done.stderr.count("stdout cannot be written to (No space left on device): lines are lost.\n") == 1
    assert done.stderr.count("trouble\n") == 100


LOGS = r"""
import logging
from tokenmill import logs, streams
streams.install(lossy=True)
print('\u2026')
for json in (False, True):
    logs.set_up(json=json)
    logging.getLogger('tokenmill').warning('\xb5s \u2026')
"""


@pytest.mark.parametrize("environ", [
    {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
])  # fmt: skip
def test_characters_that_an_output_has_not_are_written_as_escapes(environ: dict[str, str]) -> None:
    done = shell("", LOGS, **environ)
    escaped, text, line = done.stdout.splitlines()
    assert escaped == "\\u2026"
    assert text.endswith(" \\u2026")
    assert json.loads(line)["fields"]["message"] == "µs …"
    assert done.stderr == ""


COMMAND = "import sys; from tokenmill.cli import main; sys.argv[1:] = {}; sys.exit(main())"
REFUSED = "Error: StartError: The output cannot be written: No space left on device."


@pytest.mark.parametrize("words, redirection, codes, error", [
    (["schema", "cli"], ">&-", [0], ""), (["schema", "cli"], "2>&-", [0], ""),
    (["schema", "cli"], "| head -n 1 > /dev/null", [0, 1], ""), (["schema", "cli"], "| true", [0, 1], ""),
    (["schema", "cli"], f">{FULL}", [1], REFUSED), (["schema", "cli"], f">{FULL} 2>&1", [1], ""),
    (["--help"], f">{FULL}", [1], REFUSED), (["serve", "--help"], f">{FULL}", [1], REFUSED),
    (["serve", "--help"], "| true", [0, 1], ""),
])  # fmt: skip
def test_a_command_ends_without_a_traceback_whatever_its_output_is(
    words: list[str], redirection: str, codes: list[int], error: str
) -> None:
    done = shell(redirection, COMMAND.format(words))
    assert done.returncode in codes, done.stderr
    assert done.stderr.startswith(error)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


class Poll:
    """`select.poll` that records its timeouts."""

    waits: ClassVar[list[float | None]] = []

    def __init__(self) -> None:
        self._poll = poll()

    def register(self, fd: int, events: int) -> None:
        self._poll.register(fd, events)

    def poll(self, timeout_ms: float | None) -> list[tuple[int, int]]:
        self.waits.append(timeout_ms)
        return self._poll.poll(timeout_ms)


def test_a_reader_that_does_not_read_is_waited_for_once_and_met_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.select, "poll", Poll)
    read, write = os.pipe()
    lost: list[OSError] = []
    outlet = _Outlet(write, lost.append, 0.01)
    line = b"x" * 999 + b"\n"
    while not lost:
        assert outlet.write(line) == len(line)
    assert lost[0].strerror == "nothing reads it"
    Poll.waits.clear()
    for _ in range(10):
        assert outlet.write(line) == len(line)
    assert Poll.waits == [0] * 10
    assert len(lost) == 1
    while len(os.read(read, 65536)) == 65536:
        pass
    outlet.write(b"again\n")
    assert os.read(read, 100) == b"again\n"
    os.close(read)
    assert outlet.write(line) == len(line)  # a broken pipe
    os.close(write)


def test_an_output_that_does_not_block_is_waited_for_by_a_command() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    outlet = _Outlet(write, lambda error: pytest.fail(str(error)), None)
    written = 0
    while written < 60_000:
        written += outlet.write(b"x" * 10_000)  # no more at once than a pipe takes
    assert len(os.read(read, 100_000)) == written
    os.close(read)
    with pytest.raises(BrokenPipeError):
        _Outlet(write, _raise, None).write(b"x")
    os.close(write)


def _raise(error: OSError) -> None:
    raise error
