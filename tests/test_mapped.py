"""Pages of mapped files: given up after reading, and there again when they are touched."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tokenmill.weights.checkpoint import Stored, map_file
from tokenmill.weights.mapped import Reading, release

SIZE = 8 << 20


def resident(path: Path) -> int:
    """Return the bytes of a mapped file that this process holds."""
    maps = Path("/proc/self/smaps").read_text()
    return sum(int(kb) << 10 for kb in re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", maps))


@pytest.fixture
def content(tmp_path: Path) -> np.ndarray[Any, Any]:
    data = np.random.default_rng(0).integers(0, 256, SIZE).astype(np.uint8)
    data.tofile(tmp_path / "file")
    return data


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_that_were_read_are_given_up_at_the_end_and_their_arrays_stay_valid(
    content: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    mapped = map_file(tmp_path / "file")

    class Source(SimpleNamespace):
        def __getitem__(self, name: str) -> Stored:
            part = Stored("part", "I8", (SIZE // 2,), mapped[SIZE // 2 :].reshape(-1, 1))
            return Stored(name, "I8", (SIZE // 2,), mapped[: SIZE // 2].reshape(-1, 1), (part,))

        def names(self) -> Iterator[str]:
            return iter(("one",))

    with Reading(Source()) as reading:
        stored = reading["one"]
        arrays = [stored.data, stored.parts[0].data]
        assert sum(int(a.sum()) for a in arrays) == int(content.sum())
        assert resident(tmp_path / "file") > SIZE * 9 // 10
    assert resident(tmp_path / "file") < SIZE // 10
    assert np.concatenate(arrays).ravel().tobytes() == content.tobytes()


def test_memory_of_other_kinds_is_left_alone(content: np.ndarray[Any, Any]) -> None:
    before = content.copy()
    release(content)
    release(content[5:5])
    assert np.array_equal(content, before)
