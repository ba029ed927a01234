"""Falcon-H1: Mamba 2 and attention side by side in each layer, with factors at all places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from tokenmill.layers.linear import Linear, Linears
from tokenmill.layers.mamba2 import Mamba2
from tokenmill.layers.mlp import act, gated, scaled
from tokenmill.layers.recurrence import CausalConv
from tokenmill.layers.scope import Scope
from tokenmill.models import _mamba2, llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, Size
from tokenmill.program.value import Value

Two = Annotated[list[float], msgspec.Meta(min_length=2, max_length=2)]
Five = Annotated[list[float], msgspec.Meta(min_length=5, max_length=5)]


class Config(_mamba2.Hybrid, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' FalconH1Config."""

    vocab_size: Size = 128000
    intermediate_size: Size = 14336
    rms_norm_eps: float = 1e-5
    max_position_embeddings: Length | None = 8192
    mamba_d_ssm: Size | None = 1024  # None: mamba_expand · hidden_size
    mamba_norm_before_gate: bool = True
    mamba_rms_norm: bool = False
    projectors_bias: bool = False
    lm_head_multiplier: float = 1.0
    embedding_multiplier: float = 1.0
    mlp_multipliers: Two | None = None  # of the gate and of the result
    key_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    attention_in_multiplier: float = 1.0
    ssm_multipliers: Five | None = None  # of gate, x, b, c and steps
    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0

    @property
    def kinds(self) -> Sequence[str]:
        """Kind of each layer. Every layer has attention, too."""
        return ["linear_attention"] * self.num_hidden_layers

    @property
    def inner(self) -> int:
        """Number of columns of the scan."""
        return self.mamba_d_ssm or super().inner

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings."""
        return self.embedding_multiplier

    @property
    def logit_scale(self) -> float:
        """Factor of the logits."""
        return self.lm_head_multiplier


class Mixer(Mamba2):
    """Mixer of Mamba 2, with factors of its inputs and a choice of norms."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        s = c.sizes
        super().__init__(s, scope, layer)
        self.factors, self.first, self.last = c.ssm_multipliers or [1.0] * 5, c.ssm_in_multiplier, c.ssm_out_multiplier
        widths = {"x": self.inner, "b": self.shared, "c": self.shared}
        outputs = {"in_proj": (self.inner, *widths.values(), s.heads)}
        self.split = Linears(scope, s.hidden, bias=s.bias, outputs=outputs)
        starts = {"x": 0, "b": self.inner, "c": self.inner + self.shared}
        self.convs = [
            CausalConv(scope / "conv1d", width, s.kernel, layer=layer, bias=s.conv_bias, start=starts[name], name=name)
            for name, width in widths.items()
        ]
        self.out = Linear(scope, self.inner, "out_proj", s.hidden, bias=c.projectors_bias)
        self.norms = None if not c.mamba_rms_norm else "before" if c.mamba_norm_before_gate else "after"

    def gate(self, y: Value, gate: Value) -> Value:
        """Gate the scan's result; normalize it before or after that, or not at all."""
        if self.norms == "before":
            return gated(gate, self.norm(y), "silu")
        y = gated(gate, y, "silu")
        return self.norm(y) if self.norms == "after" else y

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        parts = self.split(scaled(x, self.first))
        gate, *convolved, dt = (scaled(part, factor) for part, factor in zip(parts, self.factors, strict=True))
        x, b, c = (act(conv(part), self.act) for conv, part in zip(self.convs, convolved, strict=True))
        return scaled(self.out(self.gate(self.scan(x, b, c, dt), gate)), self.last)


class Attention(llama.Attention):
    """Llama's attention, with factors."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.first, self.key, self.last = c.attention_in_multiplier, c.key_multiplier, c.attention_out_multiplier

    def norm(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Multiply the keys."""
        return q, scaled(k, self.key)

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        return scaled(super().__call__(scaled(x, self.first)), self.last)


class Layer(llama.Layer):
    """Llama's decoder layer, with Mamba 2 beside attention."""

    second_norm = "pre_ff_layernorm"

    def mixer(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the sum of both mixers."""
        mamba, attention = Mixer(c, scope / "mamba", layer), Attention(c, scope / "self_attn", layer)
        return lambda x: mamba(x) + attention(x)

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer, with factors of the gate and of the result."""
        mlp, inner = scope / "feed_forward", c.intermediate_size
        outputs = {"gate_proj": inner, "up_proj": inner}
        gate_up = Linears(mlp, c.hidden_size, shard="column", bias=c.mlp_bias, outputs=outputs)
        down = Linear(mlp, inner, "down_proj", c.hidden_size, shard="row", bias=c.mlp_bias)
        first, last = c.mlp_multipliers or (1.0, 1.0)

        def apply(x: Value) -> Value:
            gate, up = gate_up(x)
            return scaled(down(gated(scaled(gate, first), up, c.act)), last)

        return apply


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer

    def __init__(self, c: Config, scope: Scope) -> None:
        super().__init__(c, scope)
        self.norm = c.norm(scope / "model.final_layernorm", c.hidden_size)
