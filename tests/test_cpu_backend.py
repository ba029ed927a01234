"""The CPU backend computes what the torch backend does, for every family of models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support_cpu import CpuDriver
from support_models import FAMILIES, make_checkpoint, reference, steps

torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_equal_transformers(tmp_path: Path, family: str) -> None:
    model = make_checkpoint(tmp_path, family)
    backend = CpuDriver.of(tmp_path)
    for rows, want in zip(steps(), reference(model, steps()), strict=True):
        got = backend.feed(rows)
        assert np.abs(got - want).max() < 3e-3 * np.abs(want).max()  # keys and values are float16
    backend.close()
