"""Qwen 1.5 and 2 MoE: Qwen 2 with experts in some layers, and one that all rows share and a gate weighs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec

from tokenmill.layers.moe import MoeMlp, Router, separate
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, llama
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import Biases, Size
from tokenmill.program.value import Value


class Sparse(llama.Config, kw_only=True):
    """Fields that Qwen's architectures with experts share, with the defaults of transformers' Qwen2MoeConfig."""

    vocab_size: Size = 151936
    hidden_size: Size = 2048
    intermediate_size: Size = 5632
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)] = 24
    max_position_embeddings: Length | None = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[int] | None = None
    moe_intermediate_size: Size = 1408
    num_experts_per_tok: Count = 4
    num_experts: Count | None = None
    num_local_experts: Count | None = None
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        if None not in (self.num_experts, self.num_local_experts) and self.num_experts != self.num_local_experts:
            raise ValueError(f"`num_experts` is {self.num_experts}, but `num_local_experts` {self.num_local_experts}")
        _moe.check_top_k(self.num_experts_per_tok, self.experts)

    @property
    def experts(self) -> int:
        """Number of experts, under either of its names."""
        return self.num_experts or self.num_local_experts or 60

    def sparse(self, layer: int) -> bool:
        """Return True for a layer with experts."""
        return layer not in (self.mlp_only_layers or ()) and (layer + 1) % self.decoder_sparse_step == 0


class Config(Sparse, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Qwen2MoeConfig."""

    num_attention_heads: Size = 16
    num_key_value_heads: Size | None = 16
    max_window_layers: int = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    shared_expert_intermediate_size: Size = 5632
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_types)} layer_types for {self.num_hidden_layers} layers")
        if "sliding_attention" in (self.layer_types or ()) and not (self.use_sliding_window and self.sliding_window):
            raise ValueError("`layer_types` names sliding_attention, but no window is used; leave `layer_types` out")

    @property
    def biases(self) -> Biases:
        """Return the biases of queries, keys and values, which `qkv_bias` sets."""
        return Biases(qkv=self.qkv_bias)

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens; 0: all tokens. Without `layer_types`, even layers slide."""
        if not self.use_sliding_window or not self.sliding_window:
            return 0
        by_default = layer % 2 == 0 and layer < self.max_window_layers
        slides = by_default if self.layer_types is None else self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else 0


def experts(c: Sparse, scope: Scope, shared: Callable[[Value], Value] | None = None) -> MoeMlp:
    """Return the experts of a layer, under Qwen's names."""
    router = Router(scope, c.hidden_size, c.experts, c.num_experts_per_tok, renormalize=c.norm_topk_prob)
    bank = separate(_moe.numbered(scope, c.experts), c.hidden_size, c.moe_intermediate_size)
    return MoeMlp(router, bank, c.act, shared=shared)


def with_shared(c: Any, scope: Scope) -> MoeMlp:
    """Return the experts of a layer, and one that all rows share and a gate weighs: a mixture of one."""
    gate = Router(scope, c.hidden_size, 1, 1, weight="shared_expert_gate.weight", score="sigmoid")
    bank = separate([scope / "shared_expert"], c.hidden_size, c.shared_expert_intermediate_size)
    return experts(c, scope, MoeMlp(gate, bank, c.act))


class Layer(llama.Layer):
    """Llama's decoder layer, with experts in some layers."""

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Callable[[Value], Value]:
        """Return the feed-forward layer."""
        return with_shared(c, scope / "mlp") if c.sparse(layer) else super().feed_forward(c, scope, layer)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
