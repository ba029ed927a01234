"""Derive the equivalent of config.json from a GGUF file's metadata."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from math import inf, log
from typing import Any

from tokenmill.errors import ModelError, Unsupported
from tokenmill.weights.gguf_architectures import ARCHITECTURES, Architecture, architecture_of

_NOT_NUMBERS = ("vocab_size", "tensor_data_layout", "pooling_type", "rope.scaling.finetuned", "expert_used_count")
"""Keys of an architecture that do not change the results of a model."""

_OF_NUMBERS = re.compile(r"attention\.|rope\.|scale|softcap|parallel|norm|act(ivation)?$|expert")
"""Keys that may change the results, by llama.cpp's naming."""

_log = logging.getLogger(__name__)


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
    kind, read = ARCHITECTURES[key], _Reader(metadata, str(metadata["general.architecture"]), path)
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{path} has no tensor 'token_embd.weight': it is no language model.")
    heads, hidden = read.number("attention.head_count"), read.number("embedding_length")
    head_dim = read.number("attention.key_length", hidden // heads)
    config = {
        "model_type": kind.model_type,
        "hidden_size": hidden,
        "intermediate_size": _inner(read),
        "num_hidden_layers": read.number("block_count") - read("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": read.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        kind.eps: read(f"attention.{kind.norm}"),
        "rope_theta": read("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(read, factors),
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
        **_rotated(read, kind, head_dim),
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


def _inner(read: _Reader) -> int:
    """Return the width of the feed-forward layers, or of the experts in a model that has no other."""
    key = "expert_feed_forward_length"
    return read.number("feed_forward_length", read.number(key) if read.has(key) else None)


def _rotated(read: _Reader, kind: Architecture, head_dim: int) -> dict[str, Any]:
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


def _window(read: _Reader, kind: Architecture) -> dict[str, Any]:
    """Return the sliding window. Raises Unsupported if there is one that the architecture has no use for."""
    window = read("attention.sliding_window", 0)
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


def _gemma2(read: _Reader) -> dict[str, Any]:
    """Return the scale of attention's scores, which in llama.cpp follows from the size of the model."""
    heads, hidden = read.number("attention.head_count"), read.number("embedding_length")
    largest = {"gemma2": 46, "gemma3": 62}[read.architecture]  # layers of the 27B models
    head_dim = read.number("attention.key_length", hidden // heads)
    return {"query_pre_attn_scalar": hidden // heads if read.number("block_count") == largest else head_dim}


def _multi_query(read: _Reader) -> dict[str, Any]:
    return {"multi_query": read.number("attention.head_count_kv", read.number("attention.head_count")) == 1}


def _falcon(read: _Reader) -> dict[str, Any]:
    """Return the generation: a model with one key-value head is of the first one."""
    grouped = read.number("attention.head_count_kv", read.number("attention.head_count")) > 1
    read("tensor_data_layout", "")
    return {"multi_query": not grouped, "new_decoder_architecture": grouped, "num_ln_in_parallel_attn": 1}


def _gpt_oss(read: _Reader) -> dict[str, Any]:
    """Return YaRN's scaling with a ramp whose ends are not rounded, as the model was trained."""
    scaling = _rope_scaling(read, {})
    return {"rope_scaling": {**scaling, "truncate": False} if scaling else {"rope_type": "default"}}


SPECIAL: Mapping[str, Callable[[_Reader], dict[str, Any]]] = {
    "gemma2": _gemma2, "gemma3": _gemma2, "starcoder": _multi_query, "falcon": _falcon, "gpt-oss": _gpt_oss,
    "falcon with two norms": lambda read: {**_falcon(read), "num_ln_in_parallel_attn": 2},
}  # fmt: skip
"""Architecture -> function that computes more fields of config.json"""


class _Reader:
    """Accessor of one architecture's keys that records which of them were read."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, path: str) -> None:
        self.metadata, self.architecture, self.path = metadata, architecture, path
        self._seen = set(_NOT_NUMBERS)

    def __call__(self, key: str, default: Any = None) -> Any:
        """Return the key's value, or the default; ModelError if there is neither."""
        self._seen.add(key)
        found = self.metadata.get(f"{self.architecture}.{key}", default)
        if found is None:
            raise ModelError(f"{self.path} lacks the key '{self.architecture}.{key}'.")
        return found

    def has(self, key: str) -> bool:
        """Return True if the file has the key."""
        return f"{self.architecture}.{key}" in self.metadata

    def number(self, key: str, default: int | None = None) -> int:
        """Return a positive integer. A list with one number per layer must hold the same number for each."""
        found = self(key, default)
        if isinstance(found, list):
            layers = self("block_count")
            if len(found) != layers:
                raise self._wrong(key, f"a list of {len(found)} numbers for {layers} layers")
            if len(set(found)) != 1:
                raise Unsupported(
                    "GGUF model", f"{self.architecture}.{key} = {found}", (), "Layers have to be of one shape here."
                )
            found = found[0]
        if type(found) is not int or found < 1:
            raise self._wrong(key, f"{found!r}, not a whole number above 0")
        return found

    def refuse_others(self) -> None:
        """Raise Unsupported for an unread key that may change the results; log any other unread key."""
        prefix, unknown = f"{self.architecture}.", []
        for name, value in self.metadata.items():
            key = name.removeprefix(prefix)
            if key == name or key in self._seen or _neutral(key, value):
                continue
            if _OF_NUMBERS.search(key):
                raise Unsupported(
                    "GGUF key", name, (), f"It is {value!r}, and the {self.architecture} model is computed without it. "
                    "Convert the model again from its original."
                )  # fmt: skip
            unknown.append(name)
        if unknown:
            _log.warning("%s has keys that are not known here, and not heeded: %s.", self.path, ", ".join(unknown))

    def _wrong(self, key: str, why: str) -> ModelError:
        return ModelError(f"{self.path}: '{self.architecture}.{key}' is {why}.")


def _neutral(key: str, value: Any) -> bool:
    """Return True for a value that does not change the results."""
    if key == "attention.causal":
        return value is True
    return value in (0, "", None) or (key.endswith(("scale", "factor")) and value == 1)


def _rope_scaling(read: _Reader, tensors: Mapping[str, list[float]]) -> dict[str, Any] | None:
    """Return the RoPE scaling as llama.cpp reads it: linear by default, and combined with a tensor of factors."""
    kind = read("rope.scaling.type", "linear")
    factor = read("rope.scaling.factor", read("rope.scale_linear", 0.0)) or 1.0
    extra = read("rope.scaling.attn_factor", 0.0) or 1.0
    original, factors = read("rope.scaling.original_context_length", 0), tensors.get("rope_freqs.weight")
    if "rope_factors_long.weight" in tensors:
        return _longrope(read, tensors, original, extra)
    betas = {key: read(f"rope.scaling.yarn_{key}", 0.0) for key in ("beta_fast", "beta_slow")}
    if kind not in ("none", "linear", "yarn"):
        raise Unsupported("rope scaling", str(kind), ("none", "linear", "yarn"))
    if not isinstance(factor, int | float) or not 0 < factor < inf:
        raise ModelError(f"{read.path}: rope.scaling.factor is {factor!r}, not a number above 0.")
    if kind != "yarn" and extra != 1:
        raise Unsupported("GGUF key", "rope.scaling.attn_factor", (), f"It is {extra!r}, without yarn scaling.")
    if factors is not None:  # llama.cpp's converter stores Llama 3's scaling in this form
        if kind == "yarn" and factor != 1:
            raise Unsupported("rope scaling", "yarn beside rope_freqs.weight", ("none", "linear"))
        return {"rope_type": "factors", "factors": [f * (factor if kind == "linear" else 1) for f in factors]}
    if kind == "none" or (factor == 1 and kind == "linear"):
        return None
    context = read("context_length")
    if kind == "linear":  # context_length is the scaled length unless both are given
        original = original or context / factor
        return {"rope_type": "linear", "factor": factor, "original_max_position_embeddings": original}
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original or context}
    scaling |= {key: value for key, value in betas.items() if value}
    if extra != 1:  # it multiplies YaRN's factor in llama.cpp, but replaces it in transformers
        scaling["attention_factor"] = extra * (0.1 * log(factor) + 1.0 if factor > 1 else 1.0)
    return scaling


def _longrope(read: _Reader, tensors: Mapping[str, list[float]], original: int, magnitude: float) -> dict[str, Any]:
    """Return Phi-3's scaling: factors for short sequences and for long ones, and a factor of the rotated numbers."""
    return {
        "rope_type": "longrope",
        "long_factor": tensors["rope_factors_long.weight"],
        "short_factor": tensors.get("rope_factors_short.weight"),
        "original_max_position_embeddings": original or read("context_length"),
        "factor": read("context_length") / (original or read("context_length")),
        "attention_factor": magnitude,
    }


def _end_ids(metadata: Mapping[str, Any]) -> list[int]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return list(dict.fromkeys(i for i in found if isinstance(i, int)))
