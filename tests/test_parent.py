"""Child processes end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")


def test_a_module_run_so_gets_its_arguments_and_is_the_main_one() -> None:
    command = [sys.executable, "-m", "tokenmill.parent", str(os.getpid()), "json.tool", "--indent", "1"]
    done = subprocess.run(command, input="[1]", capture_output=True, text=True, check=True)
    assert done.stdout == "[\n 1\n]\n"


def test_it_does_not_begin_if_its_parent_has_ended() -> None:
    command = [sys.executable, "-m", "tokenmill.parent", str(os.getpid() + 1), "json.tool"]
    done = subprocess.run(command, input="[1]", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_it_is_killed_with_its_parent_while_it_still_imports(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    starts = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'tokenmill.parent', str(os.getpid()), 'slow'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "importing\n"
    parent.kill()
    assert not psutil.wait_procs([child], 5)[1]
    parent.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signals_are_left_to_the_parent_and_are_the_usual_ones_for_what_is_started(number: int) -> None:
    code = (
        "import os, subprocess, sys; from tokenmill.parent import leave_signals_to_parent\n"
        f"leave_signals_to_parent(); os.kill(os.getpid(), {int(number)})\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"child.send_signal({int(number)}); print(child.wait())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{-int(number)}\n"
