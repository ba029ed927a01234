"""Pages of mapped files: what a process holds of a checkpoint while it reads it."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.weights.checkpoint import Checkpoint, Stored, within_file


class Reading:
    """View of a checkpoint that gives up the pages of the tensors that were read when its `with` block ends.

    Otherwise a process holds a whole checkpoint beside its own form of it until the files are closed. Arrays stay
    valid: a page is mapped again if it is touched. For one thread; several may have views of one checkpoint.
    """

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self._read: list[NDArray[np.uint8]] = []

    @property
    def config(self) -> dict[str, Any]:
        """See `Checkpoint`."""
        return self._source.config

    @property
    def format(self) -> str:
        """See `Checkpoint`."""
        return self._source.format

    def names(self) -> Iterator[str]:
        """See `Checkpoint`."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `Checkpoint`."""
        return self._source.shape(name)

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        return self._source.nbytes(name)

    def __getitem__(self, name: str) -> Stored:
        """See `Checkpoint`."""
        stored = self._source[name]
        self._read += [part.data for part in (stored, *stored.parts)]
        return stored

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        for rows in self._read:
            release(rows)
        self._read = []


def release(rows: NDArray[np.generic]) -> None:
    """Give up the pages of rows of a mapped file; rows of other memory are left alone."""
    found = within_file(rows)
    if found is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    mapped, first = found
    start = first // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(OSError):  # it is advice
        mapped.madvise(mmap.MADV_DONTNEED, start, first + rows.nbytes - start)
