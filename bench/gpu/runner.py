"""Run the parts of a plan, each a process with a time limit, and record their lines at once.

Parts of one lane run one after another, lanes in parallel. Before a timed section, a process acquires the host, shared
or exclusively.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.machine import wait_until_free
from bench.gpu.servers import last_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Process to run, and the labels of its figures. `needs`: a part that must have succeeded before; "": none."""

    name: str
    who: str  # "ours", "peer"; "files": writes them
    shape: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    variant: str = ""
    needs: str = ""


class Host:
    """Lock of the host for timed sections, shared or exclusive."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing, self._alone = 0, False

    def enter(self, alone: bool, until: float) -> bool:
        """Acquire the lock; return False if that fails until `until` (time.monotonic()). `alone`: exclusively."""

        def free() -> bool:
            return not self._alone and not (alone and self._sharing)

        with self._changed:
            if not self._changed.wait_for(free, max(0.0, until - time.monotonic())):
                return False
            self._alone, self._sharing = alone, self._sharing + (not alone)
            return True

    def leave(self) -> None:
        """Release the lock."""
        with self._changed:
            if self._alone:
                self._alone = False
            else:
                self._sharing -= 1
            self._changed.notify_all()


class Record:
    """Lines of a run, in memory and appended to a file."""

    def __init__(self, path: Path) -> None:
        self.lines: list[dict[str, Any]] = []
        self._path, self._lock, self._began = path, threading.Lock(), time.monotonic()

    def add(self, **line: Any) -> None:
        """Record a line, and print it if it is a figure or a failure."""
        with self._lock:
            line["at"] = round(time.monotonic() - self._began, 1)
            self.lines.append(line)
            with self._path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
            told = f"{line['figure']}: {line['value']} {line['unit']}" if "figure" in line else line.get("failed", "")
            if told:
                print(f"{line['at']:6.1f} s  {line['part']}  {told}", flush=True)


class Runner:
    """State that lanes share. `until`: end of the whole run, time.monotonic()."""

    def __init__(self, record: Record, folder: Path, until: float) -> None:
        self.record, self.folder, self.until = record, folder, until
        self.host, self.stopped = Host(), threading.Event()
        self.doing: dict[str, str] = {}  # owner -> its current activity, for the lines of the others
        self._ended: dict[str, bool] = {}  # part -> whether it succeeded
        self._changed = threading.Condition()

    def lane(self, parts: list[Part], card: str) -> None:
        """Run parts one after another."""
        for part in parts:
            ok = self.run(part, card)
            self.doing.pop(part.who, None)
            with self._changed:
                self._ended[part.name] = ok
                self._changed.notify_all()
            wait_until_free(card, timeout_s=min(20.0, self._left()))

    def run(self, part: Part, card: str = "") -> bool:
        """Run a part to its end or its limit and return True on success. Failures are recorded, never raised."""
        if part.needs and not self._wait_for(part.needs):
            why = f"not begun: {part.needs} is not there"
        elif self._left() < 5:
            why = "not begun: the time is over"
        else:
            why = self._run(part, card)
        if why:
            self.record.add(part=part.name, who=part.who, shape=part.shape, failed=why)
        return not why

    def _run(self, part: Part, card: str) -> str:
        """Run a part and return the cause of its failure, or ""."""
        log = self.folder / f"{part.name.replace(':', '-')}.log"
        self.doing[part.who] = f"{part.name}: start"
        environment = os.environ | part.environment | ({"CUDA_VISIBLE_DEVICES": card} if card else {})
        with log.open("ab") as err:
            process = subprocess.Popen(part.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err,
                                       env=environment, start_new_session=True)  # fmt: skip
            try:
                why = _Following(self, part, process, err).follow()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # kills remaining descendants
                process.wait()
        return f"{why}; {last_line(log)}" if why else ""

    def _wait_for(self, name: str) -> bool:
        with self._changed:
            while name not in self._ended and self._left() > 0:
                self._changed.wait(0.2)
            return self._ended.get(name, False)

    def _left(self) -> float:
        return 0.0 if self.stopped.is_set() else self.until - time.monotonic()


class _Following:
    """Reader of a part's output that acquires the host on its request."""

    def __init__(self, runner: Runner, part: Part, process: subprocess.Popen[bytes], log: Any) -> None:
        self._runner, self._part, self._process, self._log = runner, part, process, log
        self._limit = time.monotonic() + part.limit_s
        self._has_turn = False
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def follow(self) -> str:
        """Read until the process ends; return the cause of a failure, or ""."""
        try:
            while not self._runner.stopped.is_set():
                left = min(self._limit, self._runner.until) - time.monotonic()
                if left <= 0:
                    return f"it took longer than {self._part.limit_s:.0f} s" if self._limit < self._runner.until else (
                        "the time is over")  # fmt: skip
                with contextlib.suppress(queue.Empty):
                    line = self._lines.get(timeout=min(left, 0.5))
                    if line is None:
                        code = self._process.wait(30)
                        return f"exit code {code}" if code else ""
                    self._hear(line)
            return "stopped"
        except (OSError, TimeoutError, subprocess.TimeoutExpired) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            if self._has_turn:
                self._runner.host.leave()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _hear(self, line: bytes) -> None:
        try:
            said = json.loads(line) if line.startswith(b"{") else None
        except ValueError:
            said = None
        if said is None:
            self._log.write(line)
            self._log.flush()
        elif "phase" in said:
            self._turn(said["phase"])
        else:
            part = self._part
            beside = [what for who, what in list(self._runner.doing.items()) if who != part.who]
            told = {"part": part.name, "who": part.who, **said, "variant": part.variant}
            self._runner.record.add(**{key: value for key, value in told.items() if key != "variant" or value},
                                    **({"meanwhile": beside} if beside else {}))  # fmt: skip

    def _turn(self, phase: str) -> None:
        host, runner = self._runner.host, self._runner
        if phase == "done":
            host.leave()
            self._has_turn = False
            runner.doing[self._part.who] = self._part.name
            return
        asked = time.monotonic()
        while not host.enter(phase == "alone", min(time.monotonic() + 1, runner.until)):
            if runner.stopped.is_set() or time.monotonic() >= runner.until or self._process.poll() is not None:
                raise TimeoutError("its turn to be timed did not come")
        self._has_turn = True
        self._limit += time.monotonic() - asked
        runner.doing[self._part.who] = f"{self._part.name}: timed"
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()
