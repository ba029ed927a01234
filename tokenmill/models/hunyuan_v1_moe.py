"""Hunyuan: Llama with experts beside a dense layer, and norms on query and key heads after their rotation."""

from __future__ import annotations

from collections.abc import Callable

from tokenmill.layers.attention import Rope, attend
from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.moe import MoeMlp, Router, separate
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, llama
from tokenmill.models._moe import Count
from tokenmill.models.llama import Biases, Size
from tokenmill.program.value import Value


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' HunYuanMoEV1Config."""

    vocab_size: Size = 290943
    rms_norm_eps: float = 1e-5
    num_experts: Count | list[Count] = 1
    moe_topk: Count | list[Count] = 1

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for experts that differ in number."""
        super().__post_init__()
        if isinstance(self.num_experts, list):
            raise ValueError("`num_experts` is a list, but the same number in all layers is supported; give a number")
        if isinstance(self.moe_topk, list) and len(self.moe_topk) != self.num_hidden_layers:
            raise ValueError(f"{len(self.moe_topk)} numbers of moe_topk for {self.num_hidden_layers} layers")
        for layer in range(self.num_hidden_layers):
            _moe.check_top_k(self.top_k(layer), self.num_experts)

    def top_k(self, layer: int) -> int:
        """Return the number of experts of a row in a layer."""
        return self.moe_topk[layer] if isinstance(self.moe_topk, list) else self.moe_topk

    @property
    def biases(self) -> Biases:
        """Return the biases: those of attention as config.json sets them, none in the feed-forward layer."""
        return Biases(self.attention_bias, self.attention_bias)

    @property
    def rope(self) -> Rope:
        """Return the rotary embedding. "dynamic" scaling with `alpha` raises the base and depends on no length."""
        scaling, size = self.rope_scaling or {}, self.head_size
        alpha = scaling.get("alpha")
        if scaling.get("rope_type") != "dynamic" or not alpha:
            return super().rope
        if not isinstance(alpha, int | float) or alpha <= 0:
            raise ValueError(f"`alpha` of the rope scaling is {alpha!r}; give a positive number")
        length = self.max_position_embeddings or type(self)().max_position_embeddings
        assert length is not None
        return Rope(size, self.rope_theta * alpha ** (size / (size - 2)), length)


class Attention(llama.Attention):
    """Llama's attention, with norms on query and key heads after the rotation."""

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.q_norm, self.k_norm = (
            RmsNorm(scope / name, c.head_size, c.rms_norm_eps, per_head=True)
            for name in ("query_layernorm", "key_layernorm")
        )

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        q, k, v = self.qkv(x)
        q, k = self.q_norm(self.rope(q)), self.k_norm(self.rope(k))
        return self.out(attend(q, k, v, layer=self.layer, head_dim=self.head_dim))


class Layer(llama.Layer):
    """Llama's decoder layer, with this file's attention and the experts beside a dense layer."""

    attention = Attention

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Callable[[Value], Value]:
        """Return the experts and the dense layer."""
        assert isinstance(c.num_experts, int)
        mlp = scope / "mlp"
        router = Router(mlp, c.hidden_size, c.num_experts, c.top_k(layer), weight="gate.wg.weight", renormalize=True)
        bank = separate(_moe.numbered(mlp, c.num_experts), c.hidden_size, c.intermediate_size)
        shared = GatedMlp(mlp / "shared_mlp", c.hidden_size, c.intermediate_size, c.act)
        return MoeMlp(router, bank, c.act, shared=shared)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
