"""GLM 4: GLM with norms before and after attention and feed-forward layer."""

from __future__ import annotations

from tokenmill.models import gemma2, glm, llama
from tokenmill.models.glm import Config

__all__ = ["Config", "Model"]


class Layer(gemma2.Layer):
    """Gemma 2's decoder layer, with other names and GLM's feed-forward layer."""

    norms = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    feed_forward = glm.Layer.feed_forward


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
