"""Make stdout and stderr robust against closed descriptors, full disks, narrow encodings and readers that have gone.

A command that cannot write its output ends with an error; a server continues without it.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any, TextIO

from tokenmill.errors import StartError

_PATIENCE_S = 1.0
"""Time that a server waits for a reader that does not read. After it, lines are dropped until it reads again."""
_AT_ONCE = 4096
"""Bytes that a writable pipe accepts without blocking (PIPE_BUF)."""


def install(*, lossy: bool) -> None:
    """Make this process's stdout and stderr accept every character, and open closed descriptors of 0, 1 and 2.

    `lossy`: True to drop output that stdout does not accept, with one message on stderr. False to raise once:
    BrokenPipeError if the reader has gone, else StartError with the cause. stderr is always lossy. Call it before
    opening other files, because they would get the numbers of closed descriptors.
    """
    for fd in (0, 1, 2):
        _occupy(fd)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stderr = _text(sys.stderr, _Outlet(2, _drop))
    sys.stdout = _text(sys.stdout, _Outlet(1, _tell if lossy else _fail, _PATIENCE_S if lossy else None))


def _occupy(fd: int) -> None:
    try:
        os.fstat(fd)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != fd:
            os.dup2(opened, fd)
            os.close(opened)


def _text(old: TextIO | None, outlet: _Outlet) -> io.TextIOWrapper:
    if old is not None:
        old.flush()
    encoding = (old.encoding if old is not None else None) or "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(outlet), encoding, "backslashreplace", line_buffering=True)


def _drop(error: OSError) -> None:
    """Ignore the error."""


def _tell(error: OSError) -> None:
    print(f"stdout cannot be written to ({error.strerror}): lines are lost.", file=sys.stderr)


def _fail(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise error
    raise StartError(f"The output cannot be written: {error.strerror}. Send it to a file or a program that takes it.")


class _Outlet(io.RawIOBase):
    """Writable stream on a descriptor that is never closed. Bytes that it does not accept are dropped.

    `on_loss`: called when bytes are dropped for the first time; may raise. `patience_s`: time to wait for a reader,
    seconds; None: unlimited.
    """

    def __init__(self, fd: int, on_loss: Callable[[OSError], None], patience_s: float | None = _PATIENCE_S) -> None:
        self._fd, self._on_loss, self._patience_s = fd, on_loss, patience_s
        self._loses = self._stalls = False

    def fileno(self) -> int:
        """See io.IOBase."""
        return self._fd

    def isatty(self) -> bool:
        """See io.IOBase."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """See io.IOBase."""
        return True

    def write(self, data: Any, /) -> int:
        """See io.RawIOBase."""
        view = memoryview(data).cast("B")
        try:
            self._wait()
            return os.write(self._fd, view[:_AT_ONCE])
        except BlockingIOError:
            return 0 if self._patience_s is None else self._lose(view, TimeoutError(0, "nothing reads it"))
        except OSError as error:
            return self._lose(view, error)

    def _wait(self) -> None:
        """Wait for a reader. Raises TimeoutError after `patience_s`, and then at once until the reader reads again."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        timeout_s = 0.0 if self._stalls else self._patience_s
        self._stalls = not poll.poll(None if timeout_s is None else timeout_s * 1000)
        if self._stalls:
            raise TimeoutError(0, "nothing reads it")

    def _lose(self, view: memoryview, error: OSError) -> int:
        told, self._loses = self._loses, True
        if not told:
            self._on_loss(error)
        return len(view)
