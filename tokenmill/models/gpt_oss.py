"""GPT-OSS: attention with sinks, half of it in a window, and experts with biases and bounded inner values."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.attention import attend
from tokenmill.layers.moe import Bank, MoeMlp, Router
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, _windows, llama
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, HeadDim, Size
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Value

_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_ALPHA = 1.702  # of the activation quick_gelu


class Config(_windows.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GptOssConfig."""

    has_mlp_bias = False

    vocab_size: Size = 201088
    hidden_size: Size = 2880
    intermediate_size: Size = 2880
    num_hidden_layers: llama.Layers = 36
    num_attention_heads: Size = 64
    num_key_value_heads: Size | None = 8
    head_dim: HeadDim | None = 64
    max_position_embeddings: Length | None = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: llama.Theta = 150000.0
    attention_bias: bool = True
    sliding_window: Length | None = 128
    num_local_experts: Count = 128
    num_experts_per_tok: Count = 4
    swiglu_alpha: float = _ALPHA
    swiglu_limit: float = 7.0

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for another slope of the activation."""
        if self.rope_scaling is None:
            self.rope_scaling = dict(_YARN)
        super().__post_init__()
        _moe.check_top_k(self.num_experts_per_tok, self.num_local_experts)
        if self.swiglu_alpha != _ALPHA or self.swiglu_limit <= 0:
            raise ValueError(
                f"`swiglu_alpha` is {self.swiglu_alpha} and `swiglu_limit` {self.swiglu_limit}, but only {_ALPHA} and "
                "a positive limit are supported"
            )

    def default_kind(self, layer: int) -> _windows.Kind:
        """Return the kind of a layer of a config.json that names none."""
        return _windows.every(2, layer)


class Attention(llama.Attention):
    """Llama's attention, with a sink for each query head."""

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.sinks = Weight((Part(scope / "sinks", c.num_attention_heads),), 0, "column")

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        q, k, v = self.qkv(x)
        q, k = self.heads(q, k)
        more = {"scale": self.scale, "window": self.window, "sinks": self.sinks}
        return self.out(attend(q, k, v, layer=self.layer, head_dim=self.head_dim, **more))  # type: ignore[arg-type]


def bank_of(scope: Scope, experts: int, width: int, inner: int) -> Bank:
    """Return the experts of a layer: stacked, transposed, and with gate and up in alternate columns."""

    def halves(name: str, index: int) -> tuple[Part, ...]:
        return tuple(Part(scope / name, inner, start, run=1, step=2, index=index) for start in (0, 1))

    def down(name: str, index: int) -> tuple[Part, ...]:
        return (Part(scope / name, width, index=index),)

    every = range(experts)
    return Bank(
        tuple(Weight(halves("gate_up_proj", i), width, "column", transposed=True) for i in every),
        tuple(Weight(down("down_proj", i), inner, "row", transposed=True) for i in every),
        tuple(Weight(halves("gate_up_proj_bias", i), 0, "column") for i in every),
        tuple(Weight(down("down_proj_bias", i), 0, "row") for i in every),
    )


class Layer(llama.Layer):
    """Llama's decoder layer, with this file's attention and experts."""

    attention = Attention

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the experts."""
        mlp, count = scope / "mlp", c.num_local_experts
        names = {"weight": "router.weight", "bias": "router.bias"}
        router = Router(mlp, c.hidden_size, count, c.num_experts_per_tok, renormalize=True, **names)
        bank = bank_of(mlp / "experts", count, c.hidden_size, c.intermediate_size)
        return MoeMlp(router, bank, "quick_gelu", limit=c.swiglu_limit, up_offset=1.0)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
