"""The CPU backend against the torch backend, for every family of models."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from support_cpu import CpuDriver
from support_models import BEYOND_CPU, FAMILIES, OFTEN, make_checkpoint, reference, steps
from support_slow import mostly_slow

from tokenmill.backends.cpu.prepare import refusal
from tokenmill.models.base import program_of
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source

torch.set_num_threads(1)


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, OFTEN))
def test_logits_of_every_family_equal_transformers(tmp_path: Path, family: str) -> None:
    model = make_checkpoint(tmp_path, family)
    why = refusal(program_of(open_checkpoint(local_source(tmp_path)).config), 16)
    assert why == BEYOND_CPU.get(family, "")
    if why:
        return
    backend = CpuDriver.of(tmp_path)
    for rows, want in zip(steps(), reference(model, steps()), strict=True):
        got = backend.feed(rows)
        assert np.abs(got - want).max() < 3e-3 * np.abs(want).max()  # keys and values are float16
    backend.close()


@pytest.mark.parametrize("family", ["llama_tied_with_biases", "qwen3"])
def test_a_bfloat16_checkpoint_is_as_near_to_float32_as_transformers_is_in_bfloat16(
    tmp_path: Path, family: str
) -> None:
    exact = make_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    want = np.concatenate(reference(exact, steps()))
    theirs = np.concatenate(reference(deepcopy(exact).to(torch.bfloat16), steps()))
    backend = CpuDriver.of(tmp_path)
    got = np.concatenate([backend.feed(rows) for rows in steps()])
    backend.close()
    # Only the factors of products are rounded, by at most 1/256; transformers also rounds sums and norms.
    assert np.abs(got - want).max() < 0.03 * np.abs(want).max()
    assert np.square(got - want).mean() < np.square(theirs - want).mean()
