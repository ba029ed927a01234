"""VaultGemma: Gemma 2 without the norms after attention and feed-forward layer."""

from __future__ import annotations

from tokenmill.models import llama
from tokenmill.models.gemma2 import Config

__all__ = ["Config", "Model"]


class Layer(llama.Layer):
    """Llama's decoder layer, with the second norm under Gemma 2's name."""

    second_norm = "pre_feedforward_layernorm"


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
