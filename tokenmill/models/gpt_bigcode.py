"""GPTBigCode (StarCoder, SantaCoder): GPT-2 with one key-value head for all query heads, and plain matrices."""

from __future__ import annotations

from collections.abc import Mapping

from tokenmill.models import _gpt, gpt2
from tokenmill.models._gpt import Act, Model
from tokenmill.program.ops import Part

__all__ = ["Config", "Model"]


class Config(_gpt.Gpt2Fields, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GPTBigCodeConfig."""

    names = gpt2.Config.names

    activation_function: Act = "gelu_pytorch_tanh"
    scale_attn_weights: bool = True
    multi_query: bool = True

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return 1 if self.multi_query else self.num_attention_heads

    @property
    def qkv(self) -> Mapping[str, int | tuple[int, ...] | tuple[Part, ...]]:
        """See `_gpt.Config`."""
        return super().qkv if self.multi_query else self.qkv_by_head

    def scale(self, layer: int) -> float:
        """Return the factor of a layer's attention scores."""
        return super().scale(layer) if self.scale_attn_weights else 1.0
