"""Child process of the supervisor, with its control pipes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from tokenmill.wire.control import ParentControl
from tokenmill.wire.messages import Configure, Failed, FromChild, Stop


class Child:
    """Running process `python -m tokenmill.child TARGET`, with its control pipes.

    Create children in the main thread, because on Linux the kernel kills a child when the thread that started it ends.
    A child has its own process group, so that Ctrl-C in a terminal reaches the supervisor only.
    """

    def __init__(self, name: str, target: str, configure: Configure, environment: Mapping[str, str],
                 pass_fds: Sequence[int] = ()) -> None:  # fmt: skip
        self.name, self.target = name, target
        self.ready = self.drained = False
        self.place = ""  # where a rank stood at its end, if that is known
        self.failure: Failed | None = None
        self._killed = False
        child_reads, we_write = os.pipe()
        we_read, child_writes = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tokenmill.child", target, str(child_reads), str(child_writes)],
                stdin=subprocess.DEVNULL, env=dict(environment), process_group=0,
                pass_fds=(child_reads, child_writes, *pass_fds),
            )  # fmt: skip
        finally:
            os.close(child_reads)
            os.close(child_writes)
        self.control = ParentControl(we_read, we_write)
        self.control.send(configure)

    @property
    def dead(self) -> bool:
        """True once the process has ended. Its last messages can still be polled."""
        return self.process.poll() is not None

    def poll(self) -> list[FromChild]:
        """Return the child's messages since the last call. Stores a `Failed` in `failure`."""
        messages = self.control.poll()
        for message in messages:
            if isinstance(message, Failed):
                self.failure = message
        return messages

    def how_it_ended(self) -> str:
        """Describe the end of the process: by its own message, else by its exit code or the signal that killed it."""
        place = f"; it stood at {self.place}" if self.place else ""
        return (self.failure.message if self.failure is not None else self._status()) + place

    def _status(self) -> str:
        code = self.process.poll()
        if code is None:
            return "it closed its control pipe"
        if code >= 0:
            return f"exit code {code}"
        killed = f"killed by {signal.Signals(-code).name}"
        return f"{killed}; if nobody sent it, the system ran out of memory" if code == -signal.SIGKILL else killed

    def stop(self) -> None:
        """Ask the process to end in order. Does not wait."""
        self.control.send(Stop())

    def kill(self) -> None:
        """Kill the process and its descendants, wait for its end, and close the pipes. Idempotent."""
        if self._killed:
            return
        self._killed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.control.close()
