"""`tokenmill quantize` on a GPU: the same rounding as on a CPU, and a checkpoint that computes nearly the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support_cuda import ON_GPU
from test_quantize import activations, model

from tokenmill import cli
from tokenmill.backends.torch.gptq import Recipe, rounded
from tokenmill.weights.checkpoint import Safetensors

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def test_a_matrix_is_rounded_as_on_a_cpu() -> None:
    x, w = activations(1024), torch.randn(512, 1024)
    here = rounded(w, x.T @ x, Recipe(128))
    there = rounded(w.cuda(), (x.T @ x).cuda(), Recipe(128))
    errors = [float((x @ (made.numbers.cpu() - w).T).norm()) for made in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_a_checkpoint_is_written_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = model(tmp_path / "model"), tmp_path / "out"
    words = ["--groupsize", "16", "--samples", "4", "--length", "64"]
    assert cli.text_generation_server(["quantize", str(source), str(out), *words]) == 0
    told = capfd.readouterr().out
    before, after = (float(told.split(f" {word}")[0].split()[-1]) for word in ("before", "after"))
    assert np.isfinite(before)
    assert abs(after / before - 1) < 0.2
    assert any(name.endswith("down_proj.qweight") for name in Safetensors(out).names())
