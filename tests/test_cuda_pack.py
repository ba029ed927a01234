"""Weights on their way from the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support_cuda import torch

from tokenmill.backends.cuda.pack import read_ahead
from tokenmill.weights.checkpoint import map_file


@pytest.mark.parametrize("first, last", [(0, 3), (1, 2), (700, 5000), (4999, 5000)])
def test_what_is_read_ahead_is_what_the_rows_lie_in(first: int, last: int, tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 24 + 5000 * 16).astype(np.uint8)
    content.tofile(tmp_path / "file")
    stored = map_file(tmp_path / "file")[24:].reshape(5000, 16)
    rows = stored.view(np.uint16)[first:last]
    asked = read_ahead(rows)
    assert asked == (24 + 16 * first, 24 + 16 * last)
    assert rows.tobytes() == content[slice(*asked)].tobytes()


def test_rows_in_memory_need_no_reading(tmp_path: Path) -> None:
    assert read_ahead(np.zeros((3, 4), np.float32)) is None
    assert read_ahead(torch.zeros(3, 4).numpy()) is None
    np.zeros(99, np.uint8).tofile(tmp_path / "file")
    assert read_ahead(map_file(tmp_path / "file")[50:50]) is None
