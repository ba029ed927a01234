"""The private folder of a running server: its sockets and metrics. Removed at the end, or by the next server."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenmill.errors import StartError

_PREFIX, _LOCK = "tokenmill-", "lock"
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")
_PROBE = "probe.socket"  # longer than the names of the sockets in it


@contextlib.contextmanager
def run_dir() -> Iterator[str]:
    """Make a folder of mode 0700 for the time of the block; first remove those of servers that were killed.

    The folder is in use as long as its lock is held: the kernel frees that however the server ends. Its path is short
    enough for Unix sockets, whatever TMPDIR is. Raises StartError if no such folder can be made.
    """
    for place in _places():
        remove_abandoned(place)
    folder = _made()
    try:
        lock = _locked(Path(folder) / _LOCK, os.O_CREAT)
    except OSError:  # a file system without locks: nothing there is ever taken to be abandoned
        lock = None
        Path(folder, _LOCK).unlink(missing_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _places() -> list[str]:
    """Folders to make it in, best first."""
    with contextlib.suppress(FileNotFoundError):
        return list(dict.fromkeys((tempfile.gettempdir(), *_SHORT)))
    return list(_SHORT)


def _made() -> str:
    why: list[str] = []
    for place in _places():
        try:
            folder = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
        except OSError as error:
            why.append(f"{place}: {error.strerror}")
            continue
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(f"{folder}/{_PROBE}")
            Path(folder, _PROBE).unlink()
            return folder
        except OSError as error:
            why.append(f"{place}: {error.strerror or error}")
            shutil.rmtree(folder, ignore_errors=True)
    raise StartError(
        f"There is no folder for this server's Unix sockets ({'; '.join(why)}). Set TMPDIR to a folder with a short "
        "path that this user may write to."
    )


def remove_abandoned(place: str | None = None) -> None:
    """Remove run folders of this user whose servers are gone. `place`: where; None: among the temporary files."""
    for folder in Path(place or tempfile.gettempdir()).glob(f"{_PREFIX}*"):
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
