"""Variants of attention and of rotations on a GPU: models of real head sizes in bfloat16, beside torch in float32.

Several block tables by window, sinks, ALiBi, compressed rows; rotations of a part of a head, in pairs, by position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import ON_GPU, CudaDriver, torch, write_random
from support_models import EXPERTS, Driver

from tokenmill.backends.base import StepLimits
from tokenmill.models.base import program_of
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
SIZES = {
    "hidden_size": 512, "intermediate_size": 768, "vocab_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 4096,
}  # fmt: skip
LONG_FACTORS = {"short_factor": [1.0 + i / 40 for i in range(32)], "long_factor": [1.0 + i / 4 for i in range(32)]}
GEMMA_KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
ROWS = {
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "q_lora_rank": None,
    "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 4, **EXPERTS, "moe_intermediate_size": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma 3: two windows of several tables": ("gemma3_text", {
        "head_dim": 256, "sliding_window": 512, "num_hidden_layers": 6, "layer_types": GEMMA_KINDS * 2,
        "query_pre_attn_scalar": 256,
    }),
    "gpt-oss: sinks": ("gpt_oss", {
        "head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 2, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    }),
    "mpt: alibi": ("mpt", {"d_model": 512, "n_heads": 8, "n_layers": 2, "max_seq_len": 4096}),
    "bloom: alibi": ("bloom", {"n_head": 8, "n_layer": 2}),
    "phi 3: longrope": ("phi3", {
        "head_dim": 64, "original_max_position_embeddings": 1024, "sliding_window": 700,
        "rope_scaling": {"rope_type": "longrope", **LONG_FACTORS},
    }),
    "glm: pairs of a part": ("glm", {"head_dim": 128, "num_key_value_heads": 2}),
    "persimmon: norms of heads": ("persimmon", {}),
    "ministral 3: queries that grow": ("ministral3", {"head_dim": 128}),
    "hunyuan: rotated, then normed": ("hunyuan_v1_dense", {"head_dim": 128}),
    "apertus: trained activation": ("apertus", {"head_dim": 64}),
    "deepseek v2: compressed rows": ("deepseek_v2", ROWS | {"first_k_dense_replace": 1}),
    "deepseek v3: compressed rows, more heads": ("deepseek_v3", ROWS | {
        "num_attention_heads": 32, "num_key_value_heads": 32, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 2,
    }),
}  # fmt: skip
TABLES = {"gemma 3: two windows of several tables": 3, "gpt-oss: sinks": 2}
LIMITS = StepLimits(2048, 24, 4096, 16)


def history(vocab_size: int) -> list[list[tuple[int, list[int]]]]:
    """Return steps: a long prompt beside a short one, single tokens, pieces behind a long context, a crowd."""
    rng = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return rng.integers(0, vocab_size, n).tolist()

    return [
        [(0, ids(1900)), (1, ids(70))], [(0, ids(700)), (1, ids(1))], [(0, ids(1))], [(1, ids(1)), (0, ids(1))],
        [(i, ids(3 * i)) for i in range(2, 24)], [(i, ids(1)) for i in range(24)], [(i, ids(1)) for i in range(9)],
        [(0, ids(1)), (1, ids(300)), (2, ids(1)), (3, ids(5))], [(0, ids(3)), (1, ids(1))], [(0, ids(1))],
    ]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_variant_equals_torch_in_half_precision(name: str, tmp_path: Path) -> None:
    family, own = MODELS[name]
    write_random(tmp_path, family, dtype=torch.bfloat16, spread=0.04, **SIZES | own)
    driver = CudaDriver(tmp_path, dtype="bfloat16", limits=LIMITS, num_blocks=1024)
    assert len(driver.windows) == TABLES.get(name, 1)
    source = open_checkpoint(local_source(tmp_path))
    expected = Driver(program_of(source.config), source, limits=LIMITS, num_blocks=1024)
    for rows in history(driver.vocab_size):
        wanted, made = expected.feed(rows), driver.feed(rows)
        off = np.linalg.norm(made - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        # The router of a model with experts may choose another expert where two are about equally good.
        worst = np.median(off) if "n_routed_experts" in own or "oss" in name else off.max()
        assert worst < 2.5e-2, (len(rows), off.argmax(), off.max(), np.median(off))


@pytest.mark.parametrize("name", ["gemma 3: two windows of several tables", "deepseek v2: compressed rows"])
def test_graphs_of_decode_steps_follow_changed_tables(name: str, tmp_path: Path) -> None:
    """Blocks that leave a window are given to other sequences while a graph is replayed."""
    family, own = MODELS[name]
    own = own | ({"first_k_dense_replace": 2} if "deepseek" in name else {"layer_types": GEMMA_KINDS})
    own |= {"num_hidden_layers": len(own.get("layer_types", "12"))}
    write_random(tmp_path, family, dtype=torch.bfloat16, spread=0.04, **SIZES | own)
    limits = StepLimits(1024, 4, 1024, 16)
    driver = CudaDriver(tmp_path, dtype="bfloat16", limits=limits, num_blocks=512, warm=True, graphs=(1, 2, 4))
    source = open_checkpoint(local_source(tmp_path))
    expected = Driver(program_of(source.config), source, limits=limits, num_blocks=512)
    rng = np.random.default_rng(1)
    first = [(i, rng.integers(0, driver.vocab_size, n).tolist()) for i, n in enumerate((700, 40, 520))]
    for rows in [first[:1], first[1:], *([(i, [int(t)]) for i in range(3)] for t in rng.integers(0, 99, 30))]:
        wanted, made = expected.feed(rows), driver.feed(rows)
        off = np.linalg.norm(made - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert off.max() < 2.5e-2, (len(rows), off)
