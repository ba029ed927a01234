"""Rotary frequencies of every scaling against transformers' functions, and the resulting lengths."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tokenmill.errors import ModelError
from tokenmill.program.rope import RopeTable

NUMBERS: dict[str, dict[str, list[Any]]] = {
    "default": {},
    "linear": {"factor": [1.0, 2.0, 4, 2.5], "original_max_position_embeddings": [512]},
    "dynamic": {"factor": [1.0, 2.0, 4]},
    "yarn": {
        "factor": [1.0, 2.0, 4.0, 40], "original_max_position_embeddings": [None, 256, 4096],
        "beta_fast": [None, 4, 32.0, 64], "beta_slow": [None, 1, 2.0], "mscale": [None, 0.0, 0.707, 1.0],
        "mscale_all_dim": [None, 0.0, 0.5, 1.0], "attention_factor": [None, 0.5, 1.2], "truncate": [None, True, False],
    },
    "longrope": {
        "factor": [None, 1.0, 4.0], "original_max_position_embeddings": [256, 2048], "attention_factor": [None, 1.2],
    },
    "llama3": {
        "factor": [8.0, 32.0], "low_freq_factor": [1.0], "high_freq_factor": [4.0, 2.0],
        "original_max_position_embeddings": [128, 1024],
    },
}  # fmt: skip
ORIGINAL = "original_max_position_embeddings"
NEEDED = {"factor", "low_freq_factor", "high_freq_factor"}


def drawn(kind: str, rng: random.Random) -> dict[str, Any]:
    needed = NEEDED - ({"factor"} if kind == "longrope" else set())
    needed |= {ORIGINAL} if kind in ("llama3", "longrope") else set()
    chosen = {k: rng.choice(v) for k, v in NUMBERS[kind].items() if k in needed or rng.random() < 0.5}
    return {rng.choice(["rope_type", "type"]): kind, **chosen}


@pytest.mark.parametrize("kind", NUMBERS)
def test_frequencies_and_magnitudes_of_random_numbers_equal_transformers(kind: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def plain(config: Any, device: Any, seq_len: int | None) -> tuple[Any, float]:
        return LlamaRotaryEmbedding(config).inv_freq, 1.0

    functions = {"default": plain, **ROPE_INIT_FUNCTIONS}

    rng = random.Random(kind)
    for _ in range(40):
        scaling, theta, dim = drawn(kind, rng), rng.choice([100.0, 1e4, 1e6]), rng.choice([16, 64, 96])
        if kind == "longrope":
            scaling |= {name: [rng.uniform(1, 9) for _ in range(dim // 2)] for name in ("short_factor", "long_factor")}
        table = RopeTable.of(dim, theta, 2048, scaling)
        config = LlamaConfig(
            hidden_size=dim * 2, num_attention_heads=2, rope_theta=theta, max_position_embeddings=2048,
            rope_scaling={k: v for k, v in scaling.items() if (k, v) != (ORIGINAL, None)},  # null fails there
        )  # fmt: skip
        for length in (None, 256, 257, 2048, 5000) if table.moves else (None,):
            want, magnitude = functions[kind](config, torch.device("cpu"), seq_len=length)
            got = table.frequencies_at(np.array([(length or 1) - 1]))[0] if table.moves else table.inverse_frequencies()
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, err_msg=str(scaling))
            assert table.magnitude() == pytest.approx(magnitude)


@pytest.mark.parametrize(
    "scaling, length, longest, prompt",
    [
        (None, 4096, 4096, 4096),
        ({"type": "linear", "factor": 4.0}, 4096, 16384, 16384),  # vicuna-7b-v1.5-16k
        ({"type": "linear", "factor": 2.5}, 4096, 10240, 10240),
        ({"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384, 16384, 16384),
        ({"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 4096}, 4096, 16384, 16384),
        ({"type": "dynamic", "factor": 2.0}, 4096, 8192, 4096),
        ({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048}, 4096, 4096, 4096),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768, 131072, 131072),  # Qwen 2.5
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 40960, 131072, 131072),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072, 131072, 131072),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 163840, 163840, 163840),
        ({"type": "yarn", "factor": 2.0}, 4096, 8192, 8192),
        ({"rope_type": "yarn", "original_max_position_embeddings": 4096}, 16384, 16384, 16384),
        ({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}, 131072, 131072, 131072),  # Llama 3.2
        ({"rope_type": "linear", "factor": 0.5}, 4096, 4096, 4096),
        ({"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 4096},
         131072, 131072, 4096),  # Phi 3
        ({"rope_type": "factors", "factors": [2.0] * 8}, 4096, 4096, 4096),
    ],
)  # fmt: skip
def test_a_factor_lengthens_the_context_once(
    scaling: dict[str, Any] | None, length: int, longest: int, prompt: int
) -> None:
    table = RopeTable.of(16, 1e4, length, scaling)
    assert (table.longest, table.exact_prompt) == (longest, prompt)


def test_a_yarn_factor_that_is_left_out_is_the_ratio_of_the_two_lengths() -> None:
    given = {"rope_type": "yarn", "original_max_position_embeddings": 1024}
    implied, told = (RopeTable.of(32, 1e4, 4096, given | more) for more in ({}, {"factor": 4.0}))
    np.testing.assert_array_equal(implied.inverse_frequencies(), told.inverse_frequencies())
    assert implied.magnitude() == told.magnitude() > 1


@pytest.mark.parametrize("number", [0, -1.0, float("inf"), float("nan"), "x", None, [2.0]])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_a_factor_that_is_no_positive_number_is_refused(kind: str, number: Any) -> None:
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(ModelError, match="incomplete or wrong"):
        RopeTable.of(16, 1e4, 64, {"rope_type": kind, "factor": number, **(scaling if kind == "llama3" else {})})


def test_a_list_of_factors_of_another_length_is_refused() -> None:
    for factors in ([2.0], [2.0] * 7, []):
        with pytest.raises(ModelError, match="factors for 8 frequencies"):
            RopeTable.of(16, 1e4, 64, {"rope_type": "factors", "factors": factors})
