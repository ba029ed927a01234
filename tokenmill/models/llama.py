"""Llama, and what every model that is Llama under another name begins with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from tokenmill.layers.attention import Rope, attend
from tokenmill.layers.embedding import Embedding
from tokenmill.layers.linear import Linear, Linears, head
from tokenmill.layers.mlp import GatedMlp, take_rows
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.scope import Scope
from tokenmill.program.value import Inputs, Value

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Act = Literal["silu", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh"]


class Config(msgspec.Struct, kw_only=True):
    """The fields of config.json that this file reads."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
    num_attention_heads: Size
    vocab_size: Size
    num_key_value_heads: Size = 0  # 0: as many as heads
    head_dim: Annotated[int, msgspec.Meta(ge=2, le=1 << 12, multiple_of=2)] = 0  # 0: hidden_size / heads
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: Annotated[float, msgspec.Meta(gt=0)] = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: Act = "silu"
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Fill in what depends on other fields; raises ValueError for heads that do not fit."""
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"{self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_key_value_heads} key-value heads for {self.num_attention_heads} heads")

    def window(self, layer: int) -> int:
        """Tokens that a layer attends to; 0: all."""
        return 0

    @property
    def bias(self) -> tuple[bool, bool]:
        """Whether attention's input and output projections have one."""
        return self.attention_bias, self.attention_bias


class Attention:
    """Attention of grouped query heads with rotary positions."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        q, kv, d = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.head_dim
        first, last = c.bias
        outputs = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv = Linears(scope, c.hidden_size, shard="column", unit=d, bias=first, outputs=outputs)
        self.out = Linear(scope, q, "o_proj", c.hidden_size, shard="row", bias=last)
        self.rope = Rope(d, c.rope_theta, c.max_position_embeddings, c.rope_scaling)
        self.layer, self.head_dim, self.window = layer, d, c.window(layer)

    def norm(self, q: Value, k: Value) -> tuple[Value, Value]:
        """What some descendants do between projection and rotation."""
        return q, k

    def __call__(self, x: Value) -> Value:
        """(tokens, hidden), the same shape."""
        q, k, v = self.qkv(x)
        q, k = self.norm(q, k)
        heads = attend(self.rope(q), self.rope(k), v, layer=self.layer, head_dim=self.head_dim, window=self.window)
        return self.out(heads)


class Layer:
    """Attention and feed-forward, each behind a norm and added to what came in."""

    attention = Attention

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        self.norm1 = RmsNorm(scope / "input_layernorm", c.hidden_size, c.rms_norm_eps)
        self.attn = self.attention(c, scope / "self_attn", layer)
        self.norm2 = RmsNorm(scope / "post_attention_layernorm", c.hidden_size, c.rms_norm_eps)
        self.mlp = GatedMlp(scope / "mlp", c.hidden_size, c.intermediate_size, c.hidden_act, bias=c.mlp_bias)

    def __call__(self, x: Value) -> Value:
        """(tokens, hidden), the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model:
    """The whole: ids to logits of the rows that sample."""

    layer = Layer

    def __init__(self, c: Config, scope: Scope) -> None:
        body = scope / "model"
        self.embed = Embedding(body / "embed_tokens", c.vocab_size, c.hidden_size)
        self.layers = [self.layer(c, body / f"layers.{i}", i) for i in range(c.num_hidden_layers)]
        self.norm = RmsNorm(body / "norm", c.hidden_size, c.rms_norm_eps)
        self.head = head(scope, c.hidden_size, c.vocab_size, self.embed.weight if c.tie_word_embeddings else None)

    def __call__(self, inputs: Inputs) -> Value:
        """Record it."""
        x = self.embed(inputs.ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(take_rows(x)))
