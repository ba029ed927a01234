"""Ranks that hang, as the supervisor sees them. The clock is the test's; the processes are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenmill import watch
from tokenmill.heartbeat import Heartbeat
from tokenmill.watch import Watch, in_collective, innermost

STACK = """Thread 0x1 (most recent call first):
  File "/usr/lib/python3/threading.py", line 300 in wait

{thread} 0x2 (most recent call first):
  File "/x/torch/distributed/c10d.py", line 7 in all_reduce
  File "/x/tokenmill/parallel/gloo.py", line 40 in all_reduce
  File "/x/tokenmill/runtime/worker.py", line 9 in main
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as running:
        yield running
        running.kill()


def look(watching: Watch, seconds: float, start: float = 1000.0) -> list[str]:
    """Look every half second, and return the hangs."""
    times = (start + 0.5 * i for i in range(int(seconds * 2) + 1))
    return [str(hang) for now in times if (hang := watching.look(now)) is not None]


def watched(tmp_path: Path, *pids: int) -> tuple[Watch, list[Heartbeat]]:
    watching, heartbeats = Watch(), []
    for rank, pid in enumerate(pids):
        heartbeats.append(Heartbeat(str(tmp_path / f"beat-{rank}")))
        heartbeats[-1].note(f"step {rank}", 3.0)
        watching.add(rank, pid, Heartbeat(str(tmp_path / f"beat-{rank}")), str(tmp_path / f"stack-{rank}"))
    return watching, heartbeats


GONE = 1 << 22  # no process has this id


def test_a_rank_without_progress_within_its_limit_hangs(tmp_path: Path) -> None:
    watching, [heartbeat] = watched(tmp_path, GONE)
    assert not look(watching, 3.0)
    heartbeat.note("step 5", 3.0)
    assert not look(watching, 3.0, 1003.5)
    assert look(watching, 1.0, 1007.0)[0] == "no progress for 4 s; it stood at step 5"
    assert watching.place(0) == "step 5"


def test_a_rank_may_wait_as_long_as_another_may_take(tmp_path: Path) -> None:
    watching, [zero, one] = watched(tmp_path, GONE, GONE)
    one.note("step 1", 60.0)
    assert not look(watching, 50.0)
    zero.note("step 9", 3.0)
    one.note("step 9", 3.0)
    assert look(watching, 4.0, 1050.5)


def test_a_sleep_of_the_machine_is_not_silence_of_a_rank(tmp_path: Path) -> None:
    watching, _ = watched(tmp_path, GONE)
    assert not look(watching, 1.0)
    assert watching.look(5000.0) is None
    assert watching.look(9000.0) is None  # each counts as a second


def test_a_debugger_or_pages_from_disk_are_not_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watching, _ = watched(tmp_path, GONE)
    with monkeypatch.context() as traced:
        traced.setattr(watch, "is_traced", lambda pid: True)
        assert not look(watching, 10.0)
    faults = iter(range(1000))
    with monkeypatch.context() as paging:
        paging.setattr(watch, "page_faults", lambda pid: next(faults))
        assert not look(watching, 10.0, 1010.0)
    assert look(watching, 4.0, 1020.0)


def test_a_wait_for_a_cpu_is_not_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watching, _ = watched(tmp_path, GONE)
    waited = iter(range(1000))
    with monkeypatch.context() as busy:
        busy.setattr(watch, "queued", lambda pid: {7: 0.4 * next(waited), 8: 100.0})
        assert not look(watching, 14.0)  # of each half second, 0.1 s were its own
    assert look(watching, 4.0, 1014.5)
    assert not watch.queued(GONE)
    assert set(watch.queued(os.getpid())) >= {os.getpid()}


def test_a_stopped_process_is_the_one_that_hangs(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    watching, [_, heartbeat] = watched(tmp_path, GONE, process.pid)
    heartbeat.note("step 1", 1800.0)  # it is loading: nothing else is a hang so early
    hang = next(hang for i in range(20) if (hang := watching.look(1000.0 + i / 2)) is not None)
    assert (hang.rank, hang.where) == (1, "step 1, stopped by a signal (SIGSTOP or SIGTSTP)")


def test_of_silent_ranks_the_one_that_waits_for_no_other_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computes = STACK.replace("all_reduce", "product")
    stacks = {0: STACK.format(thread="Current thread"), 1: computes.format(thread="Thread")}
    monkeypatch.setattr(watch, "dump", lambda ranks: stacks)
    watching, _ = watched(tmp_path, GONE, GONE)
    hang = next(hang for i in range(20) if (hang := watching.look(1000.0 + i / 2)) is not None)
    assert (hang.rank, hang.where, hang.stacks) == (1, "step 1, product (parallel/gloo.py:40)", stacks)


def test_a_stack_names_the_innermost_function_of_this_package_in_the_main_thread() -> None:
    for thread in ("Current thread", "Thread"):
        assert innermost(STACK.format(thread=thread)) == "all_reduce (parallel/gloo.py:40)"
        assert in_collective(STACK.format(thread=thread))
    assert innermost("") == ""
    assert not in_collective("")


def test_a_process_writes_its_stack_however_it_is_stuck(tmp_path: Path) -> None:
    stack = tmp_path / "stack-0"
    code = f"import faulthandler, signal\nfaulthandler.register(signal.SIGUSR1, file=open({str(stack)!r}, 'wb'))\n"
    code += "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as stuck:
        assert stuck.stdout is not None
        stuck.stdout.readline()
        watching, _ = watched(tmp_path, stuck.pid)
        stacks = watch.dump(watching.ranks)
        stuck.kill()
    assert 'in <module>' in stacks[0]
