"""Phi 3, 3.5 and 4: Llama with fused matrices; long contexts by frequencies of their own (longrope)."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import _gpt
from tokenmill.models._gpt import Act, Layers, Length, Model, Names, Size, same_act

__all__ = ["Config", "Model"]


class Config(_gpt.RotaryFields, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Phi3Config."""

    names = Names(
        "model.embed_tokens", "model.layers", "model.norm", attention="self_attn", qkv=("qkv_proj",), output="o_proj"
    )

    vocab_size: Size = 32064
    hidden_size: Size = 3072
    intermediate_size: Size = 8192
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    hidden_act: Act = "silu"
    max_position_embeddings: Length | None = 4096
    original_max_position_embeddings: Length = 4096
    rms_norm_eps: float = 1e-5
    sliding_window: Length | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for a scaling that transformers' class does not support."""
        scaling: dict[str, Any] = self.rope_scaling or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "longrope", "su", "yarn"):
            raise ValueError(f"rope scaling {kind!r} of this model type is not supported; it has longrope")
        if kind != "default":  # "yarn" is what the first files call it
            original = {"original_max_position_embeddings": self.original_max_position_embeddings}
            self.rope_scaling = {k: v for k, v in scaling.items() if k != "type"} | original | {"rope_type": "longrope"}
        super().__post_init__()

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.rms_norm_eps

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens; 0: all tokens."""
        return self.sliding_window or 0

    def norm(self, scope: Scope, width: int) -> RmsNorm:
        """Return a norm of the model."""
        return RmsNorm(scope, width, self.eps)

    def mlp(self, scope: Scope) -> GatedMlp:
        """Return the feed-forward layer."""
        return GatedMlp(scope, self.hidden_size, self.inner, same_act(self.activation), fused="gate_up_proj")
