"""Whole models in every form of weights: the CPU backend's logits against those of the same weights as floats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from support_cpu import CpuDriver

from tokenmill.backends.cpu.isa import available
from tokenmill.quant import gguf, int4, int8
from tokenmill.quant.base import Coded, Piece, dense
from tokenmill.weights.checkpoint import Stored

PAIRED = available()[0].pairs
HIDDEN, INNER, VOCABULARY, HEAD = 256, 512, 96, 32
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (2 * HEAD, HIDDEN),
    "self_attn.v_proj": (2 * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


class Made:
    """A checkpoint of one layer in memory. `kinds`: GGUF type names by the last words of a tensor's name."""

    format = "gguf"

    def __init__(self, kinds: dict[str, str], default: str) -> None:
        self.kinds, self.default, self.config = kinds, default, _config()
        self.shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
            "lm_head.weight": (VOCABULARY, HIDDEN),
            "model.norm.weight": (HIDDEN,),
            "model.layers.0.input_layernorm.weight": (HIDDEN,),
            "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        } | {f"model.layers.0.{name}.weight": shape for name, shape in PROJECTIONS.items()}

    def names(self) -> Iterator[str]:
        return iter(self.shapes)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.shapes.get(name)

    def nbytes(self, name: str) -> int:
        return self[name].data.nbytes

    def __getitem__(self, name: str) -> Stored:
        shape = self.shapes[name]
        if len(shape) == 1:
            return Stored(name, "F32", shape, np.ones((*shape, 4), np.uint8))
        kind = next((k for end, k in self.kinds.items() if end in name), self.default)
        return Stored(name, kind, shape, np.zeros((1, 1), np.uint8))

    def read(self, source: Any, piece: Piece) -> Coded:
        """Return random numbers that depend on the name of the tensor only."""
        shape = self.shapes[piece.name]
        if len(shape) == 1:
            return dense(np.ones(shape, np.float32)[piece.rows])
        rng = np.random.default_rng(sorted(self.shapes).index(piece.name))
        return matrix(self[piece.name].kind, *shape, rng).take(piece.rows, piece.columns)

    def read_floats(self, source: Any, piece: Piece) -> Coded:
        """Return the same numbers as floats, not in blocks."""
        return dense(self.read(source, piece).floats())


def _config() -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
        "num_attention_heads": HIDDEN // HEAD, "num_key_value_heads": 2, "head_dim": HEAD, "vocab_size": VOCABULARY,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False,
    }  # fmt: skip


def matrix(kind: str, rows: int, columns: int, rng: np.random.Generator) -> Coded:
    """Return random numbers of about 1 / √columns, stored as `kind`."""
    x = (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
    if kind in ("int4", "int8"):
        return {"int4": int4, "int8": int8}[kind].blocks(x.reshape(rows, -1, 32))
    if kind == "F32":
        return dense(x)
    if kind == "F16":
        return dense(x.astype(np.float16))
    if kind == "BF16":
        return dense((x.view(np.uint32) >> 16).astype(np.uint16))
    size, block, at = {
        "Q4_0": (18, 32, {0: 0.01}), "Q4_1": (20, 32, {0: 0.01, 2: -0.075}), "Q5_0": (22, 32, {0: 0.005}),
        "Q5_1": (24, 32, {0: 0.005, 2: -0.0775}), "Q8_0": (34, 32, {0: 0.0007}),
        "Q4_K": (144, 256, {0: 3e-4, 2: 22e-4}), "Q5_K": (176, 256, {0: 15e-5, 2: 23e-4}),
        "Q6_K": (210, 256, {208: 4e-5}), "Q2_K": (84, 256, {80: 0.004, 82: 0.0008}), "Q3_K": (110, 256, {108: 5e-4}),
        "IQ4_NL": (18, 32, {0: 8e-4}), "IQ4_XS": (136, 256, {0: 5e-5}), "TQ1_0": (54, 256, {52: 0.06}),
        "TQ2_0": (66, 256, {64: 0.05}), "MXFP4": (17, 32, {}),
    }[kind]  # fmt: skip
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for place, number in at.items():
        raw[..., place : place + 2] = np.float16([number]).view(np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = rng.integers(120, 123, raw.shape[:2])
    return gguf.UNPACK[kind](raw)


STEPS: list[list[tuple[int, list[int]]]] = [
    [(0, [5, 9, 31, 77, 2, 50, 8]), (1, [1])],
    [(0, [4]), (1, [90, 17])],
]


def logits(made: Made, read: Any, isa: str = "") -> list[np.ndarray]:
    backend = CpuDriver(made, read=read, cpu_isa=isa)
    out = [backend.feed(rows).copy() for rows in STEPS]
    backend.close()
    return out


MIXED = {"q_proj": "Q4_K", "k_proj": "Q4_K", "v_proj": "Q6_K", "down": "Q6_K", "embed": "Q4_K", "lm_head": "Q6_K"}


@pytest.mark.parametrize(
    "kinds, default",
    [
        ({}, "Q4_0"),
        ({"embed": "Q5_0", "lm_head": "Q8_0"}, "Q4_1"),
        ({"v_proj": "Q5_0", "lm_head": "Q5_0"}, "Q5_1"),
        (MIXED, "Q4_K"),
        ({"lm_head": "Q6_K"}, "Q5_K"),
        ({"down": "Q3_K", "lm_head": "Q6_K"}, "Q2_K"),
        ({"v_proj": "Q5_0", "lm_head": "IQ4_NL"}, "IQ4_XS"),
        ({"embed": "TQ2_0", "v_proj": "MXFP4", "lm_head": "MXFP4"}, "TQ1_0"),
        ({"v_proj": "F16"}, "Q8_0"),
        ({}, "int8"),
        ({"embed": "int8"}, "int4"),
        ({}, "F16"),
        ({"down": "F16", "v_proj": "F32"}, "BF16"),
    ],
    ids=lambda v: v if isinstance(v, str) else "mixed" if v else "all",
)
def test_a_model_in_blocks_gives_the_logits_of_its_numbers(kinds: dict[str, str], default: str) -> None:
    made = Made(kinds, default)
    for got, want in zip(logits(made, made.read), logits(made, made.read_floats), strict=True):
        assert np.isfinite(got).all()
        # Activations have 8 bits if weights are in blocks: an error of about 1/100 of the spread of a row's logits. So
        # have those of bfloat16 on a CPU with bfloat16 products: 8 significant bits, each with its own exponent.
        bound = 0.02 if default == "BF16" and PAIRED else 1e-5 if default in ("F16", "BF16") else 0.05
        assert np.abs(got - want).max() < bound * np.abs(want).max()
        assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.999


@pytest.mark.skipif(not PAIRED, reason="this machine does not multiply bfloat16")
def test_without_bfloat16_products_activations_stay_float32() -> None:
    made = Made({}, "BF16")
    for got, want in zip(logits(made, made.read, "avx512vnni"), logits(made, made.read_floats), strict=True):
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q6_K", "F16", "BF16"])
def test_one_number_that_is_none_shows_in_the_logits(kind: str) -> None:
    made = Made({}, kind)

    def read(source: Any, piece: Piece) -> Coded:
        numbers = made.read(source, piece)
        if "post_attention" in piece.name and numbers.dense:
            numbers.codes[3] = np.nan
        return numbers

    for got in logits(made, read):
        assert np.isnan(got).all()
