"""Create the private folder of a running server, for sockets and metrics; it or the next server removes it."""

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
_PROBE = "probe-of-a-socket"  # longer than the names of the sockets in the folder


@contextlib.contextmanager
def run_dir() -> Iterator[str]:
    """Create a folder of mode 0700 for the duration of the block, after removing those of killed servers.

    A folder is in use while its lock is held; the kernel releases the lock when the server ends, in whatever way. The
    path is short enough for Unix sockets, regardless of TMPDIR. Raises StartError if no folder can be created.
    """
    for place in _places():
        remove_abandoned(place)
    folder = _made()
    try:
        lock = _locked(Path(folder) / _LOCK, os.O_CREAT)
    except OSError:  # without locks on this file system, folders never count as abandoned
        lock = None
        Path(folder, _LOCK).unlink(missing_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _places() -> list[str]:
    """Return the candidate parent folders, best first."""
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
    """Remove run folders of this user whose servers have ended. `place`: parent folder; None: tempfile's default."""
    for folder in Path(place or tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = _locked(folder / _LOCK)
        except OSError:
            continue  # no lock yet, or no permission
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(path: Path, flags: int = 0) -> int | None:
    """Return a descriptor that holds the lock; None if another process holds it. OSError if the file is missing."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd
