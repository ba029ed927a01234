"""Variants of attention and of rotations on a GPU: models of real head sizes in bfloat16, beside torch in float32.

Several block tables by window, sinks, ALiBi, compressed rows; rotations of a part of a head, in pairs, by position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import ON_GPU, CudaDriver, cuda_job, torch, write_random
from support_models import EXPERTS, Driver
from support_programs import Draw

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.models.base import program_of
from tokenmill.program import ops
from tokenmill.program.rope import RopeTable
from tokenmill.program.value import Inputs, Value
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
GEMMA = "gemma 3: two windows of several tables"
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


def assert_near(driver: Any, expected: Driver, rows: list[tuple[int, list[int]]], most: float, median: bool) -> None:
    wanted, made = expected.feed(rows), driver.feed(rows)
    off = np.linalg.norm(made - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert (np.median(off) if median else off.max()) < most, (len(rows), off.argmax(), off.max(), np.median(off))


@pytest.mark.parametrize("name, dtype", [*((name, "bfloat16") for name in MODELS), (GEMMA, "float32")])
def test_a_variant_equals_torch(name: str, dtype: str, tmp_path: Path) -> None:
    family, own = MODELS[name]
    write_random(tmp_path, family, dtype=torch.bfloat16, spread=0.04, **SIZES | own)
    driver = CudaDriver(tmp_path, dtype=dtype, limits=LIMITS, num_blocks=1024)
    assert len(driver.windows) == (3 if name == GEMMA else 1)
    source = open_checkpoint(local_source(tmp_path))
    expected = Driver(program_of(source.config), source, limits=LIMITS, num_blocks=1024)
    most = 2e-3 if dtype == "float32" else 6e-2 if name == GEMMA else 2.5e-2  # of six layers with four norms each
    for rows in history(driver.vocab_size):  # a router may choose another expert where two are about equally good
        assert_near(driver, expected, rows, most, median="n_routed_experts" in own)


class Sinks(Draw):
    """Two layers of attention with sinks, one of them with a window, and heads as of GPT-OSS."""

    def _model(self, inputs: Inputs) -> Value:
        x = inputs.ids.record(ops.Embed, 512, ids=inputs.ids, table=self.weight(1024, 512))
        for layer, window in enumerate((128, 0)):
            q, k, v = self.linear(x, 16 * 64, 2 * 64, 2 * 64)
            y = q.record(
                ops.Attention, 16 * 64, q=q, k=k, v=v, layer=layer, head_dim=64, scale=0.125, window=window,
                sinks=self.weight(16), rope=RopeTable.of(64, 1e4, 4096, None), alibi=(0.01, 0.1) * 8 * layer,
            )  # fmt: skip
            x = x + self.linear(y, 512)[0]
        x = x.record(ops.Norm, x=x, weight=None, eps=1e-5)
        return self.linear(x.record(ops.TakeRows, rows="samples", x=x), 1024)[0]


@pytest.mark.parametrize("kind", ["", "fp8_e5m2"])
def test_sinks_and_alibi_equal_torch_beside_windows(kind: str) -> None:
    draw = Sinks(0)
    program = draw.program()
    driver = CudaDriver.__new__(CudaDriver)
    CudaBackend.__init__(
        driver, cuda_job(program, draw.source(), LIMITS, "bfloat16", cuda_graphs=(), kv_cache_dtype=kind)
    )
    driver.allocate(1024)
    driver.free, driver.known, driver.tables = np.random.default_rng(3).permutation(1024).tolist(), {}, {}
    assert driver.windows == (0, 128)
    expected = Driver(program, draw.source(), limits=LIMITS, num_blocks=1024)  # type: ignore[arg-type]
    for rows in history(1024):
        assert_near(driver, expected, rows, 0.15 if kind else 2.5e-2, median=False)


@pytest.mark.parametrize("name", [GEMMA, "deepseek v2: compressed rows"])
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
        assert_near(driver, expected, rows, 4e-2, median=False)
