"""Experts in two tensors, as transformers 5 holds them in memory: read as those that are stored one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support_models import FAMILIES, SIZES, Driver, prompts, reference, write_model
from support_states import STATES

from tokenmill.weights.fused import parts_of

torch.set_num_threads(1)
CASES = {name: (kind, SIZES | own) for name, (kind, own) in FAMILIES.items()} | STATES
FUSED = (
    "mixtral", "qwen2_moe_mixed", "qwen3_moe", "phimoe", "glm4_moe", "hunyuan_v1_moe", "deepseek_v3", "minimax_m2",
    "ernie4_5_moe", "olmoe", "gemma4_experts", "qwen3_5_moe", "lfm2_moe", "nemotron_h_experts", "jamba",
    "granitemoe", "granitemoeshared", "granitemoehybrid", "exaone_moe", "afmoe",
)  # fmt: skip


def in_memory(folder: Path, model: Any) -> set[str]:
    """Replace the weights of a folder by those under the names that transformers' memory has. Return the names."""
    tensors = {name: t.detach().contiguous().clone() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return set(tensors)


@pytest.mark.parametrize("name", FUSED[:4] + tuple(pytest.param(n, marks=pytest.mark.slow) for n in FUSED[4:]))
def test_a_model_as_transformers_holds_it_in_memory_is_read(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, *CASES[name])
    names = in_memory(tmp_path, model)
    assert any(n.endswith(("experts.gate_up_proj", "experts.up_proj", "experts.gate_up_proj.weight")) for n in names)
    rows = [[(0, prompts()[1])]]
    (want,) = reference(model, rows)
    np.testing.assert_allclose(Driver.of(tmp_path).feed(rows[0]), want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_tensors_are_divided_only_if_their_shapes_are_those_of_experts() -> None:
    fused = {"a.experts.gate_up_proj": (2, 12, 4), "a.experts.down_proj": (2, 4, 6)}
    up = list(parts_of("a.experts.gate_up_proj", fused))
    assert [part.name for part in up] == [f"a.experts.{i}.{m}_proj.weight" for i in (0, 1) for m in ("gate", "up")]
    assert [(part.shape, part.start) for part in up] == [((6, 4), n) for n in (0, 24, 48, 72)]
    assert [part.start for part in parts_of("a.experts.down_proj", fused)] == [0, 24]
    for other in (
        {"a.experts.gate_up_proj": (2, 4, 12), "a.experts.down_proj": (2, 6, 4)},  # transposed
        {"a.experts.gate_up_proj": (2, 12, 4)},
        {"a.experts.down_proj": (2, 4, 6)},
        {"a.gate_up_proj": (2, 12, 4), "a.down_proj": (2, 4, 6)},
    ):
        assert not [part for name in other for part in parts_of(name, other)]
