"""FlexOlmo: OLMoE with the norms of OLMo 2."""

from __future__ import annotations

from tokenmill.models import llama, olmo2, olmoe
from tokenmill.models._moe import Count
from tokenmill.models.llama import Size


class Config(olmoe.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' FlexOlmoConfig."""

    vocab_size: Size = 100352
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: llama.Layers = 32
    num_attention_heads: Size = 32
    rms_norm_eps: float = 1e-6
    rope_theta: llama.Theta = 500000.0
    num_experts_per_tok: Count = 5
    num_experts: Count = 7


class Layer(olmo2.Layer):
    """OLMo 2's decoder layer, with experts."""

    feed_forward = olmoe.Layer.feed_forward


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
