"""Derive the equivalent of config.json from a GGUF file's metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tokenmill.errors import ModelError, Unsupported
from tokenmill.weights.gguf_architecture import Architecture
from tokenmill.weights.gguf_architectures import ARCHITECTURES, architecture_of
from tokenmill.weights.gguf_reader import Reader
from tokenmill.weights.gguf_rope import rope_scaling
from tokenmill.weights.gguf_special import SPECIAL


def config_of(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Mapping[str, list[float]], path: str
) -> dict[str, Any]:
    """Derive the equivalent of config.json.

    `shapes`: shapes of all tensors, by the file's names. `factors`: content of the tensors that the architecture names
    as its `factors`. Raises Unsupported or ModelError, with the key, for values that llama.cpp also refuses, and for
    keys that would change the results in an unsupported way. Other unknown keys of the architecture are logged.
    """
    key = architecture_of(metadata, shapes)
    if key not in ARCHITECTURES:
        raise Unsupported("GGUF architecture", key, ARCHITECTURES)
    kind = ARCHITECTURES[key]
    read = Reader(metadata, shapes, path, zeros=kind.heads == "some", factors=factors)
    read.ignore(*kind.ignored)
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{path} has no tensor 'token_embd.weight': it is no language model.")
    config = {
        "model_type": kind.model_type,
        "hidden_size": read.number("embedding_length"),
        "num_hidden_layers": read.number("block_count") - read.count("nextn_predict_layers"),
        kind.eps: read(f"attention.{kind.norm}"),
        "max_position_embeddings": read.number("context_length"),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": has_bias(shapes, "attn"),
        "mlp_bias": has_bias(shapes, "ffn"),
        "use_bias": has_bias(shapes, "attn") or has_bias(shapes, "ffn"),
        "lm_head_bias": "output.bias" in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_ids(metadata),
        "torch_dtype": "float16",  # not in the metadata; the type of the scales
        **kind.constants,
        **(_heads(read, kind, factors) if kind.heads != "none" else {}),
        **_window(read, kind),
        **{field: read(own) for field, own in kind.fields.items() if read.has(own)},
        **(SPECIAL[key](read) if key in SPECIAL else {}),
    }
    weighed = read("expert_gating_func", 2 if kind.sigmoid else 1)
    if weighed != (2 if kind.sigmoid else 1):
        raise Unsupported(
            "GGUF key", f"{read.architecture}.expert_gating_func", (), f"It is {weighed!r}, and the experts of this "
            "architecture are weighed in another way. Convert the model again from its original."
        )  # fmt: skip
    if kind.scores_bias:
        config[kind.scores_bias] = config["attention_bias"]
    read.refuse_others()
    return {kind.renamed.get(name, name): value for name, value in config.items()}


def _heads(read: Reader, kind: Architecture, factors: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return the sizes of attention and feed-forward layers, and the rotation."""
    heads = read.number("attention.head_count")
    head_dim = read.number("attention.key_length", read.number("embedding_length") // heads)
    return {
        "intermediate_size": _inner(read, kind),
        "num_attention_heads": heads,
        "num_key_value_heads": read.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": read("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(read, factors) or kind.unscaled,
        **_rotated(read, kind, head_dim),
    }


def _inner(read: Reader, kind: Architecture) -> int | None:
    """Return the width of the feed-forward layers, or of the experts in a model that has no other.

    None if layers may differ in it.
    """
    if kind.widths:
        return None
    key = "expert_feed_forward_length"
    return read.number("feed_forward_length", read.number(key) if read.has(key) else None)


def _rotated(read: Reader, kind: Architecture, head_dim: int) -> dict[str, Any]:
    """Return the share of a head that is rotated. ModelError if the architecture has no such heads."""
    for key in ("attention.value_length", "rope.dimension_count"):
        number = read.number(key, head_dim)
        partial = kind.partial and key == "rope.dimension_count"
        if number != head_dim and not partial:
            raise ModelError(
                f"{read.path}: '{read.architecture}.{key}' is {number}, but heads have {head_dim} numbers. llama.cpp "
                f"serves no such {read.architecture} model either; convert it again from its original."
            )
    share = read.number("rope.dimension_count", head_dim) / head_dim
    return {"partial_rotary_factor": share, "rotary_dim": round(share * head_dim)} if kind.partial else {}


def _window(read: Reader, kind: Architecture) -> dict[str, Any]:
    """Return the sliding window. Raises Unsupported if there is one that the architecture has no use for."""
    window = read.count("attention.sliding_window")
    if kind.windows:
        return {"sliding_window": window or None}
    if window and window < read.number("context_length"):
        raise Unsupported(
            "GGUF key", f"{read.architecture}.attention.sliding_window", (), f"It is {window}, and llama.cpp does not "
            "heed it for this architecture. Serve the model's original (safetensors), whose config.json names the "
            "layers."
        )  # fmt: skip
    return {}


def has_bias(names: Iterable[str], group: str) -> bool:
    """Return True if any layer's products have a bias in `group`: "attn" (attention) or "ffn" (feed-forward)."""
    return any(re.fullmatch(rf"blk\.\d+\.{group}_(?!.*norm)\w+\.bias", name) for name in names)


def _end_ids(metadata: Mapping[str, Any]) -> list[int]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return list(dict.fromkeys(i for i in found if isinstance(i, int)))
