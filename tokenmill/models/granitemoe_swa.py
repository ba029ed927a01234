"""Granite MoE with sliding windows, and a shared expert."""

from __future__ import annotations

from tokenmill.models import _moe, gpt_oss, granite_swa, granitemoeshared, llama
from tokenmill.models._moe import Count, Natural
from tokenmill.models.base import Length
from tokenmill.models.llama import Size


class Config(granite_swa.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GraniteMoeSWAConfig."""

    has_mlp_bias = False

    vocab_size: Size = 32000
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: llama.Layers = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None
    max_position_embeddings: Length | None = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    num_local_experts: Count = 8
    num_experts_per_tok: Count = 2
    shared_intermediate_size: Natural = 0

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        _moe.check_top_k(self.num_experts_per_tok, self.num_local_experts)


class Layer(granitemoeshared.Layer):
    """Granite's decoder layer with experts, and sinks in attention."""

    attention = gpt_oss.Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
