"""Hunyuan: Llama with experts beside a dense layer, and norms on query and key heads after their rotation."""

from __future__ import annotations

from collections.abc import Callable

from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.moe import MoeMlp, Router, separate
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, hunyuan_v1_dense, llama
from tokenmill.models._moe import Count
from tokenmill.program.value import Value


class Config(hunyuan_v1_dense.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' HunYuanMoEV1Config."""

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


class Layer(llama.Layer):
    """Llama's decoder layer, with this file's attention and the experts beside a dense layer."""

    attention = hunyuan_v1_dense.Attention

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
