"""Display the progress of long operations: bars on a terminal, log lines for JSON output, else plain lines."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Protocol

from tokenmill.wire.messages import Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

_VERBS = {"download": "Downloading", "convert": "Converting", "load": "Loading", "warmup": "Warming up",
          "compile": "Compiling this machine's kernels for"}  # fmt: skip
_log = logging.getLogger("tokenmill.start")


class Display(Protocol):
    """Interface of a progress display."""

    def line(self, text: str) -> None:
        """Print a line of text."""

    def progress(self, progress: Progress) -> None:
        """Show the progress of a phase. A new phase ends the previous one."""

    def close(self) -> None:
        """Stop displaying progress, and leave the output in place. Idempotent."""


def display(*, json: bool = False) -> Display:
    """Return the display that suits this process's stdout."""
    if json:
        return LogDisplay()
    return Bars() if sys.stdout.isatty() else Lines()


def amount(count: float, unit: str) -> str:
    """Format a number of bytes or items: `96.3 MB`, `12 items`."""
    if unit != "bytes":
        return f"{count:.0f} {unit}"
    for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {name}"
    return f"{count:.0f} B"


def title(progress: Progress) -> str:
    """Format a phase and its object: `Downloading owner/model`."""
    verb = _VERBS.get(progress.phase, progress.phase.capitalize())
    return f"{verb} {progress.detail}".rstrip()


class Lines:
    """Display of plain lines: when a phase begins, every few seconds, and when it ends."""

    every_s = 5.0

    def __init__(self) -> None:
        self._phase = ""
        self._began = self._said = 0.0
        self._complete = False

    def line(self, text: str) -> None:
        """Print a line at once."""
        print(text, flush=True)

    def progress(self, progress: Progress) -> None:
        """Print a line if the phase is new or complete, or if the last line is some seconds old."""
        now = time.monotonic()
        complete = 0 < progress.total <= progress.done
        if progress.phase != self._phase:
            self._phase, self._began, self._said, self._complete = progress.phase, now, now, complete
            if not complete:
                self.line(f"{title(progress)} …")
                return
        elif self._complete or (not complete and now - self._said < self.every_s):
            return
        self._said, self._complete = now, complete
        self.line(f"{title(progress)}: {self._how_far(progress, now)}")

    def _how_far(self, progress: Progress, now: float) -> str:
        done = amount(progress.done, progress.unit)
        if progress.total <= 0:
            return done
        rate = progress.done / max(now - self._began, 1e-3)
        if progress.done >= progress.total:
            return f"{done} in {now - self._began:.1f} s"
        left = (progress.total - progress.done) / max(rate, 1e-9)
        share, total = 100 * progress.done // progress.total, amount(progress.total, progress.unit)
        if not progress.done:
            return f"{share} % of {total}"
        return f"{share} % of {total}, {amount(rate, progress.unit)}/s, {left:.0f} s left"

    def close(self) -> None:
        """Do nothing."""


class LogDisplay(Lines):
    """Display of the same lines as log records, for `--json-output`."""

    def line(self, text: str) -> None:
        """Log a line."""
        _log.info("%s", text)


class Bars:
    """Display of one bar per phase, with rate and remaining time."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        self._console = Console(highlight=False, soft_wrap=True)
        whole = Column(no_wrap=True)
        self._bars = RichProgress(
            TextColumn("{task.description}", table_column=whole), BarColumn(bar_width=None),
            DownloadColumn(table_column=whole), TransferSpeedColumn(table_column=whole),
            TimeRemainingColumn(compact=True), console=self._console, expand=True,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def line(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, markup=False)

    def progress(self, progress: Progress) -> None:
        """Update the phase's bar."""
        if progress.unit != "bytes" or not progress.total:
            if progress.phase not in self._tasks:
                self.line(f"{title(progress)} …")
                self._tasks[progress.phase] = self._bars.add_task("", visible=False)
            return
        if progress.phase not in self._tasks:
            name = title(progress).replace(progress.detail, progress.detail.rpartition("/")[2])
            self._tasks[progress.phase] = self._bars.add_task(name, total=progress.total)
            self._bars.start()
        self._bars.update(self._tasks[progress.phase], completed=progress.done, total=progress.total)
        if self._bars.finished:
            self.close()

    def close(self) -> None:
        """Leave the bars as they are."""
        if self._bars.live.is_started:
            self._bars.stop()
