"""Memory that the ranks of a model share, without torch: their lines for meetings, token ids, and values.

Rank 0 makes it and the others map it. A system file without a name where there is one (Linux), so nothing can be left
behind; elsewhere a file that is removed once all ranks have mapped it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.layout import LINE
from tokenmill.backends.cpu.scratch import zeros
from tokenmill.parallel.group import Group

_PAGE = 4096


class RankLost(ConnectionError):
    """Another rank has left, has died, or did not arrive in time."""


class Peers:
    """The ranks of a model and the memory that they share: `nbytes` for values, and room for `ids` token ids.

    Blocks until all ranks of the group have mapped it. Raises RuntimeError if they ask for different sizes, or if they
    are not on one host.
    """

    def __init__(self, group: Group, nbytes: int, ids: int) -> None:
        self.rank, self.size, self.nbytes = group.rank, group.size, nbytes
        head = -(-(self.size * LINE + 8 * ids) // _PAGE) * _PAGE
        self._memory = _mapped(group, head + nbytes)
        self._lines = self._memory[: self.size * LINE].view(np.int64).reshape(self.size, -1)
        self._ids: NDArray[np.int64] = self._memory[self.size * LINE :][: 8 * ids].view(np.int64)
        self.values = self._memory[head:]
        self._lines[self.rank, 1] = os.getpid()
        group.exchange(b"")  # none waits for a rank before its process id is there
        self._context = np.zeros(0, np.int64)
        self._meetings = zeros((0,))

    def ids(self, count: int) -> NDArray[np.int64]:
        """Return the ids of a step's sampling rows, which rank 0 writes. Valid until the next step."""
        return self._ids[:count]

    def join(self, context: NDArray[np.int64], threads: int, patience_s: float) -> None:
        """Write the words of meetings into the context of the steps. `patience_s`: time to wait for a rank."""
        libc = ctypes.CDLL(None)
        self._context, self._meetings = context, zeros((threads, 64))
        context[[layout.RANK, layout.RANKS, layout.RANK_LINES]] = self.rank, self.size, self._lines.ctypes.data
        context[[layout.MEETINGS, layout.PATIENCE]] = self._meetings.ctypes.data, max(1, int(patience_s * 1800))
        context[[layout.NAP, layout.PROBE]] = _address(libc.usleep), _address(libc.kill)

    def check(self) -> None:
        """Raise RankLost if a meeting of the last step has failed."""
        if lost := int(self._context[layout.LOST]):
            rank = abs(lost) - 1
            why = "has ended" if lost > 0 else "did not arrive in time"
            raise RankLost(f"rank {rank} {why} while rank {self.rank} waited for it within a step")

    def close(self) -> None:
        """Leave: ranks that wait for this one give up. Idempotent."""
        self._lines[self.rank, 1] = 0


def _mapped(group: Group, nbytes: int) -> NDArray[np.uint8]:
    """Map memory that the ranks of a group share."""
    sizes = [int(size) for size in group.exchange(str(nbytes).encode())]
    if len(set(sizes)) > 1:
        raise RuntimeError(f"The ranks need shared memory of different sizes: {sizes} bytes. Start them alike.")
    for make in (_nameless, _named):
        with contextlib.ExitStack() as until_mapped:
            path = make(nbytes, until_mapped) if group.rank == 0 else ""
            path = group.exchange(path.encode())[0].decode()
            memory = _map(path, nbytes)
            if all(group.exchange(b"" if memory is None else b"1")):
                assert memory is not None
                return memory
    raise RuntimeError(
        "The ranks cannot share memory. They must be processes of one user on one host; elsewhere, use --backend torch."
    )


def _nameless(nbytes: int, until_mapped: contextlib.ExitStack) -> str:
    """Return a path to memory that lives as long as a process maps it; "" if this system has none."""
    if not hasattr(os, "memfd_create"):
        return ""
    fd = os.memfd_create("tokenmill ranks")
    until_mapped.callback(os.close, fd)
    os.ftruncate(fd, nbytes)
    return f"/proc/{os.getpid()}/fd/{fd}"


def _named(nbytes: int, until_mapped: contextlib.ExitStack) -> str:
    """Return the path of a file that is removed once it is mapped; "" if there is no room for it."""
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    fd, path = tempfile.mkstemp(prefix="tokenmill-ranks-", dir=folder)
    until_mapped.callback(os.close, fd)
    until_mapped.callback(os.unlink, path)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, nbytes)  # else a write to a full file system ends the process
        else:
            os.ftruncate(fd, nbytes)
    except OSError:
        return ""
    return path


def _map(path: str, nbytes: int) -> NDArray[np.uint8] | None:
    """Map a file; None if this process cannot."""
    if not path:
        return None
    try:
        with open(path, "r+b") as file:
            if os.fstat(file.fileno()).st_size != nbytes:
                return None  # of another host, by chance
            mapped = mmap.mmap(file.fileno(), nbytes)
    except OSError:
        return None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
