"""Bamba: Mamba 2 in most layers, attention in the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.scope import Scope
from tokenmill.models import _mamba2, llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, Size


class Config(_mamba2.Hybrid, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' BambaConfig."""

    rotates_whole_heads: ClassVar[bool] = False

    vocab_size: Size = 128000
    intermediate_size: Size = 14336
    rms_norm_eps: float = 1e-5
    max_position_embeddings: Length | None = 262144
    attn_layer_indices: list[int] | None = None

    @property
    def kinds(self) -> Sequence[str]:
        """Kind of each layer."""
        attends = self.attn_layer_indices or ()
        kinds = ("linear_attention", "full_attention")
        return [kinds[layer in attends] for layer in range(self.num_hidden_layers)]

    @property
    def rotary_dim(self) -> int:
        """Number of columns of a head that are rotated: half, regardless of config.json."""
        return self.head_size // 2


class Layer(_mamba2.Layer):
    """Decoder layer with a mixer of Mamba 2 or attention."""

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer."""
        return GatedMlp(scope / "feed_forward", c.hidden_size, c.intermediate_size, c.act, bias=c.mlp_bias)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer

    def __init__(self, c: Config, scope: Scope) -> None:
        super().__init__(c, scope)
        self.norm = c.norm(scope / "model.final_layernorm", c.hidden_size)
