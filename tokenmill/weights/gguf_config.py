"""From a GGUF file's metadata to what config.json would say."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

from tokenmill.errors import ModelError, Unsupported

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""general.architecture -> model_type"""


def config_of(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: list[float] | None, path: str
) -> dict[str, Any]:
    """`shapes`: of all tensors by the file's names. `rope_factors`: the tensor rope_freqs.weight, if there."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise Unsupported("GGUF architecture", str(architecture), ARCHITECTURES)
    read = _Reader(metadata, architecture, path)
    if read("expert_count", 0):
        raise Unsupported("GGUF architecture", f"{architecture} with experts", ARCHITECTURES)
    heads, hidden = read("attention.head_count"), read("embedding_length")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise ModelError(f"{path}: head_count {heads!r} or embedding_length {hidden!r} is not a number to be used.")
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{path} has no tensor 'token_embd.weight': it is no language model.")
    context = read("context_length")
    window = read("attention.sliding_window", 0) if architecture == "llama" else 0
    return {
        "model_type": "mistral" if window else ARCHITECTURES[architecture],
        "hidden_size": hidden,
        "intermediate_size": read("feed_forward_length"),
        "num_hidden_layers": read("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read("attention.head_count_kv", heads),
        "head_dim": read("attention.key_length", hidden // heads),
        "rms_norm_eps": read("attention.layer_norm_rms_epsilon"),
        "rope_theta": read("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(read, rope_factors),
        "max_position_embeddings": context,
        "sliding_window": window or None,
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_ids(metadata),
        "torch_dtype": "float16",  # nobody says; what its scales are in
    }


class _Reader:
    """Keys of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, path: str) -> None:
        self.metadata, self.architecture, self.path = metadata, architecture, path

    def __call__(self, key: str, default: Any = None) -> Any:
        """The key's value, or the default; ModelError if there is neither."""
        found = self.metadata.get(f"{self.architecture}.{key}", default)
        if found is None:
            raise ModelError(f"{self.path} lacks the key '{self.architecture}.{key}'.")
        return found


def _rope_scaling(read: _Reader, factors: list[float] | None) -> dict[str, Any] | None:
    if factors is not None:  # how llama.cpp's converter writes Llama 3's scaling
        return {"rope_type": "factors", "factors": factors}
    kind, factor = read("rope.scaling.type", "none"), read("rope.scaling.factor", 0.0) or read("rope.scale_linear", 0.0)
    if kind == "none" or (not factor and kind == "linear"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise Unsupported("rope scaling", str(kind), ("none", "linear", "yarn"))
    if not isinstance(factor, float) or not factor > 0:
        raise ModelError(f"{read.path}: rope.scaling.factor is {factor!r}, not a number above 0.")
    context = read("context_length")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": read("rope.scaling.original_context_length", context),
    }
    for key in ("beta_fast", "beta_slow"):
        if value := read(f"rope.scaling.yarn_{key}", 0.0):
            scaling[key] = value
    if extra := read("rope.scaling.attn_factor", 0.0):  # theirs is on top of YaRN's own, transformers' in its place
        scaling["attention_factor"] = extra * (0.1 * log(factor) + 1.0 if factor > 1 else 1.0)
    return scaling


def _end_ids(metadata: Mapping[str, Any]) -> list[int]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return list(dict.fromkeys(i for i in found if isinstance(i, int)))
