"""Heartbeat of an engine rank: a small shared file in which the rank notes where it stands, and the supervisor reads.

A note costs about a microsecond and no system call. It is readable however the rank is stuck: in a collective, in a
kernel, or stopped by a signal.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

_HEAD = struct.Struct("<QdH")  # number of notes, limit in seconds, bytes of the place
_SIZE = 512
_MOST = _SIZE - _HEAD.size

STARTING = "its start"
"""Place of a rank that has not noted any."""
SLACK_S = 10.0
"""Seconds that a rank gets beyond a limit that it observes itself, so that its own message is first."""


class Pulse(NamedTuple):
    """A note of a rank.

    `notes`: their number so far. `limit_s`: seconds in which the next one must follow. `place`: where the rank stands,
    as "step 12 (3 rows, 40 tokens)".
    """

    notes: int
    limit_s: float
    place: str


class Heartbeat:
    """Notes of one rank in the file `path`, which is made if it is not there. Not thread-safe."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, _SIZE)
            self._memory = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        self._notes = self.read().notes
        self._place, self._length = "", 0  # as they are in memory

    def note(self, place: str, limit_s: float) -> None:
        """Note that the rank lives and stands at `place`, and will note something else within `limit_s` seconds."""
        self._notes += 1
        if place is not self._place:
            text = place.encode()[:_MOST]
            self._memory[_HEAD.size : _HEAD.size + len(text)] = text
            self._place, self._length = place, len(text)
        _HEAD.pack_into(self._memory, 0, self._notes, limit_s, self._length)

    def read(self) -> Pulse:
        """Return the last note. One that is being written may be read in part."""
        notes, limit_s, length = _HEAD.unpack_from(self._memory)
        text = self._memory[_HEAD.size : _HEAD.size + min(length, _MOST)].decode(errors="replace")
        return Pulse(notes, limit_s, text or STARTING)

    def close(self) -> None:
        """Release the memory. Idempotent."""
        self._memory.close()


def heartbeat_path(run_dir: str, engine: int, rank: int) -> str:
    """Return the path of a rank's heartbeat."""
    return str(Path(run_dir) / f"heartbeat-{engine}-{rank}")


def stack_path(run_dir: str, engine: int, rank: int) -> str:
    """Return the path of the file to which a rank writes its stack when it gets SIGUSR1."""
    return str(Path(run_dir) / f"stack-{engine}-{rank}")
