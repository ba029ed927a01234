"""MiniMax M2: Mixtral with DeepSeek's choice of experts, and norms over whole rows of queries and keys."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec

from tokenmill.models import llama, mixtral, olmo2
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import Size


class Config(mixtral.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' MiniMaxM2Config."""

    rotates_whole_heads: ClassVar[bool] = False

    vocab_size: Size = 200064
    hidden_size: Size = 3072
    intermediate_size: Size = 1536
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)] = 62
    num_attention_heads: Size = 48
    head_dim: llama.HeadDim | None = 128
    max_position_embeddings: Length | None = 196608
    rms_norm_eps: float = 1e-6
    rope_theta: Annotated[float, msgspec.Meta(gt=0)] = 5e6
    num_local_experts: Count = 256
    num_experts_per_tok: Count = 8
    rotated: Annotated[int, msgspec.Meta(ge=2)] | None = msgspec.field(default=None, name="rotary_dim")  # None: a share

    def window(self, layer: int) -> int:
        """Return 0: no layer has a sliding window."""
        return 0

    @property
    def rotary_dim(self) -> int:
        """Number of columns of a head that are rotated, which released checkpoints name instead of their share."""
        return super().rotary_dim if self.rotated is None else self.rotated

    @property
    def choice(self) -> dict[str, Any]:
        """Return the fields of the routing, as of `ops.Route`."""
        return {"correction": "e_score_correction_bias", "score": "sigmoid", "renormalize": True}


class Layer(mixtral.Layer):
    """Mixtral's decoder layer, with OLMoE's norms."""

    attention = olmo2.Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
