"""Models with a state per sequence on a GPU: every family against torch, through graphs; layers of real widths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support_cuda import ON_GPU, CudaDriver, torch
from support_models import Driver, steps, write_model
from support_states import STATES

from bench.gpu.states import LAYERS, Layer
from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.prepare import refusal
from tokenmill.models.base import program_of
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


@pytest.mark.parametrize("family", STATES)
def test_a_family_gives_torchs_logits_through_graphs(family: str, tmp_path: Path) -> None:
    model_type, fields = STATES[family]
    try:
        write_model(tmp_path, model_type, fields)
    except (KeyError, ValueError) as error:
        pytest.skip(f"this version of transformers has no {model_type}: {error}")
    if why := refusal(program_of(open_checkpoint(local_source(tmp_path)).config), "float32"):
        pytest.skip(why)
    limits = StepLimits(64, 4, 256, 16)
    found = CudaDriver(tmp_path, limits=limits, warm=True, graphs=(1, 2, 4))
    assert not any(ring[0].any() for ring in found._states._rings.values())
    expected = Driver.of(tmp_path, limits=limits)
    for rows in steps():
        np.testing.assert_allclose(found.feed(rows), expected.feed(rows), atol=2e-3, rtol=1e-2)
    found.close()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_real_widths_equals_torch_in_float32(name: str) -> None:
    torch.manual_seed(0)
    for off in Layer(name, max_tokens=1024, rows=4).errors():
        assert off < 2e-2
