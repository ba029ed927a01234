"""GPT-2: learned positions, and matrices that are stored transposed."""

from __future__ import annotations

from tokenmill.models import _gpt
from tokenmill.models._gpt import Model, Names

__all__ = ["Config", "Model"]


class Config(_gpt.Gpt2Fields, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GPT2Config."""

    names = Names(
        "transformer.wte", "transformer.h", "transformer.ln_f", positions="transformer.wpe", norm1="ln_1",
        norm2="ln_2", attention="attn", qkv=("c_attn",), output="c_proj", inner=("c_fc", "c_proj"),
    )  # fmt: skip
    transposed = True

    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def scale(self, layer: int) -> float:
        """Return the factor of a layer's attention scores."""
        scale = super().scale(layer) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale
