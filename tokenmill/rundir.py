"""The private folder of a running server: its sockets and metrics. Removed at the end, or by the next server."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX, _LOCK = "tokenmill-", "lock"


@contextlib.contextmanager
def run_dir() -> Iterator[str]:
    """Make a folder of mode 0700 for the time of the block; first remove those of servers that were killed.

    The folder is in use as long as its lock is held: the kernel frees that however the server ends.
    """
    remove_abandoned()
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    lock = _locked(Path(folder) / _LOCK, os.O_CREAT)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned() -> None:
    """Remove run folders of this user whose servers are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = _locked(folder / _LOCK)
        except OSError:
            continue  # no lock yet, or not ours to look at
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(path: Path, flags: int = 0) -> int | None:
    """A descriptor that holds the lock, or None if another process does. Raises OSError if there is no such file."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd
