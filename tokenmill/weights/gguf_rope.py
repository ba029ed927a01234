"""Read the RoPE scaling of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

from tokenmill.errors import ModelError, Unsupported
from tokenmill.weights.gguf_reader import Reader


def rope_scaling(read: Reader, tensors: Mapping[str, list[float]]) -> dict[str, Any] | None:
    """Return the RoPE scaling as llama.cpp reads it: linear by default, and combined with a tensor of factors."""
    kind = read("rope.scaling.type", "linear")
    factor: float = read.real("rope.scaling.factor", read.real("rope.scale_linear", 0.0)) or 1.0
    extra: float = read.real("rope.scaling.attn_factor", 0.0) or 1.0
    original, factors = read.count("rope.scaling.original_context_length"), tensors.get("rope_freqs.weight")
    if "rope_factors_long.weight" in tensors:
        return _longrope(read, tensors, original, extra)
    betas = {key: read.real(f"rope.scaling.yarn_{key}", 0.0) for key in ("beta_fast", "beta_slow")}
    if kind not in ("none", "linear", "yarn"):
        raise Unsupported("rope scaling", str(kind), ("none", "linear", "yarn"))
    if factor <= 0:
        raise ModelError(f"{read.path}: rope.scaling.factor is {factor!r}, not a number above 0.")
    if kind != "yarn" and extra != 1:
        raise Unsupported("GGUF key", "rope.scaling.attn_factor", (), f"It is {extra!r}, without yarn scaling.")
    if factors is not None:  # llama.cpp's converter stores Llama 3's scaling in this form
        if kind == "yarn" and factor != 1:
            raise Unsupported("rope scaling", "yarn beside rope_freqs.weight", ("none", "linear"))
        return {"rope_type": "factors", "factors": [f * (factor if kind == "linear" else 1) for f in factors]}
    if kind == "none" or (factor == 1 and kind == "linear"):
        return None
    context = read.number("context_length")
    if kind == "linear":  # context_length is the scaled length unless both are given
        before = original or context / factor
        return {"rope_type": "linear", "factor": factor, "original_max_position_embeddings": before}
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original or context}
    scaling |= {key: value for key, value in betas.items() if value}
    if extra != 1:  # it multiplies YaRN's factor in llama.cpp, but replaces it in transformers
        scaling["attention_factor"] = extra * (0.1 * log(factor) + 1.0 if factor > 1 else 1.0)
    return scaling


def _longrope(read: Reader, tensors: Mapping[str, list[float]], original: int, magnitude: float) -> dict[str, Any]:
    """Return Phi-3's scaling: factors for short sequences and for long ones, and a factor of the rotated numbers."""
    return {
        "rope_type": "longrope",
        "long_factor": tensors["rope_factors_long.weight"],
        "short_factor": tensors.get("rope_factors_short.weight"),
        "original_max_position_embeddings": original or read.number("context_length"),
        "factor": read.number("context_length") / (original or read.number("context_length")),
        "attention_factor": magnitude,
    }
