"""Llama, and the base of the architectures derived from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec

from tokenmill.layers.attention import Rope, attend
from tokenmill.layers.embedding import Embedding
from tokenmill.layers.linear import Linear, Linears, head
from tokenmill.layers.mlp import GatedMlp, clipped, scaled, soft_cap, take_rows
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import base
from tokenmill.models.base import Length
from tokenmill.program.value import Inputs, Value

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
Theta = Annotated[float, msgspec.Meta(gt=0)]
HeadDim = Annotated[int, msgspec.Meta(ge=2, le=1 << 12, multiple_of=2)]
Act = Literal[
    "silu", "swish", "relu", "relu2", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate",
    "gelu_pytorch_tanh", "gelu_python_tanh",
]  # fmt: skip
_SAME_ACTS = {
    "swish": "silu", "gelu_python": "gelu", "gelu_fast": "gelu_new", "gelu_accurate": "gelu_new",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}  # fmt: skip
"""transformers' name of an activation -> the name that backends use"""
Apply = Callable[[Value], Value]
"""A layer: it records its operations on a value and returns the result"""


def act_of(name: str) -> str:
    """Return the name that backends use of an activation of transformers."""
    return _SAME_ACTS.get(name, name)


class Biases(NamedTuple):
    """Flags of the products that have a bias: attention's input projections, its output projection, feed-forward."""

    qkv: bool = False
    output: bool = False
    mlp: bool = False


class Config(base.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' LlamaConfig."""

    rotates_whole_heads: ClassVar[bool] = True
    rotates_neighbours: ClassVar[bool] = False  # a rotation pairs adjacent columns of a head instead of halves
    has_mlp_bias: ClassVar[bool] = True  # False: `mlp_bias` is no field of the architecture, and is ignored

    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    vocab_size: Size = 32000
    num_key_value_heads: Size | None = None  # None: num_attention_heads
    head_dim: HeadDim | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: Length | None = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: Theta = 10000.0
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: Act = "silu"
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that are inconsistent, or that transformers' class does not support."""
        if self.head_dim is None and self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"{self.num_attention_heads} heads do not divide hidden_size {self.hidden_size} into even numbers"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} key-value heads for {self.num_attention_heads} heads")
        if self.rotates_whole_heads and self.partial_rotary_factor != 1:
            raise ValueError(
                f"`partial_rotary_factor` is {self.partial_rotary_factor}, but this model type rotates whole heads; "
                "leave it out"
            )
        if self.rotary_dim > self.head_size:
            raise ValueError(
                f"`partial_rotary_factor` is {self.partial_rotary_factor}, more than the {self.head_size} columns of a "
                "head; give a share of them, at most 1"
            )
        scaling = (self.rope_scaling or {}).get("rope_type", "default")
        if self.max_position_embeddings is None and scaling not in ("default", "linear"):
            raise ValueError(f"`max_position_embeddings` is null, but {scaling} rope scaling needs it; give a number")

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Number of columns of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Number of columns of a head that are rotated, from the left."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def rope(self) -> Rope:
        """Return the rotary embedding of queries and keys."""
        length = self.max_position_embeddings or type(self)().max_position_embeddings
        assert length is not None
        size, scaling = self.head_size, self.rope_scaling
        return Rope(size, self.rope_theta, length, scaling, self.rotary_dim, interleaved=self.rotates_neighbours)

    @property
    def max_positions(self) -> int:
        """See `base.Config`."""
        return self.rope.table.longest

    @property
    def exact_prompt(self) -> int:
        """See `base.Config`."""
        return self.rope.table.exact_prompt

    @property
    def unstretched(self) -> int:
        """See `base.Config`."""
        return self.rope.table.max_position

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary embedding of a layer; None if it has no positions."""
        return self.rope

    def norm(self, scope: Scope, width: int, *, per_head: bool = False) -> Apply:
        """Return a norm of this architecture."""
        return RmsNorm(scope, width, self.rms_norm_eps, per_head=per_head)

    @property
    def act(self) -> str:
        """Return the activation of the feed-forward layer."""
        return act_of(self.hidden_act)

    @property
    def biases(self) -> Biases:
        """Return the flags of the products that have a bias."""
        return Biases(self.attention_bias, self.attention_bias, self.mlp_bias and self.has_mlp_bias)

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens; 0: all tokens."""
        return 0

    @property
    def attention_scale(self) -> float:
        """Factor of the products of queries and keys."""
        return float(self.head_size**-0.5)

    @property
    def attention_cap(self) -> float:
        """Soft cap of the products of queries and keys; 0: none."""
        return 0.0

    @property
    def clip(self) -> float:
        """Bound of queries, keys and values, after norms and before the rotation; 0: none."""
        return 0.0

    @property
    def logit_cap(self) -> float:
        """Soft cap of the logits; 0: none."""
        return 0.0

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings."""
        return 1.0

    @property
    def branch_scale(self) -> float:
        """Factor of the results of attention and feed-forward layer, before they are added."""
        return 1.0

    @property
    def logit_scale(self) -> float:
        """Factor of the logits."""
        return 1.0


class Attention:
    """Grouped-query attention with rotary position embedding."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        d = c.head_size
        q, kv = c.num_attention_heads * d, c.kv_heads * d
        outputs = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv = Linears(scope, c.hidden_size, shard="column", unit=d, bias=c.biases.qkv, outputs=outputs)
        self.out = Linear(scope, q, "o_proj", c.hidden_size, shard="row", bias=c.biases.output)
        self.rope = c.rope_of(layer)
        self.layer, self.head_dim, self.window = layer, d, c.window(layer)
        self.scale, self.softcap, self.clip = c.attention_scale, c.attention_cap, c.clip

    def norm(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Normalize queries and keys before the rotation. Returns them unchanged here; derived models override it."""
        return q, k

    def heads(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Normalize and rotate queries and keys."""
        q, k = (clipped(x, self.clip) for x in self.norm(q, k))
        return (q, k) if self.rope is None else (self.rope(q), self.rope(k))

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        q, k, v = self.qkv(x)
        q, k = self.heads(q, k)
        v = clipped(v, self.clip)
        return self.out(
            attend(
                q, k, v, layer=self.layer, head_dim=self.head_dim, scale=self.scale, window=self.window,
                softcap=self.softcap,
            )
        )  # fmt: skip


class Layer:
    """Decoder layer: attention and feed-forward layer, each with a norm before it and a residual connection."""

    attention: type[Attention] = Attention
    first_norm, second_norm = "input_layernorm", "post_attention_layernorm"

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        self.norm1: Apply = c.norm(scope / self.first_norm, c.hidden_size)
        self.attn = self.mixer(c, scope, layer)
        self.norm2: Apply = c.norm(scope / self.second_norm, c.hidden_size)
        self.mlp = self.feed_forward(c, scope, layer)
        self.scale = c.branch_scale

    def mixer(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return attention. Derived models that mix tokens in another way override it."""
        return self.attention(c, scope / "self_attn", layer)

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer. Derived models with experts override it."""
        return GatedMlp(scope / "mlp", c.hidden_size, c.intermediate_size, c.act, bias=c.biases.mlp)

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        x = x + scaled(self.attn(self.norm1(x)), self.scale)
        return x + scaled(self.mlp(self.norm2(x)), self.scale)


class Model:
    """Complete model: from token ids to the logits of the rows that sample."""

    layer: type[Layer] = Layer

    def __init__(self, c: Config, scope: Scope) -> None:
        body = scope / "model"
        self.embed = Embedding(body / "embed_tokens", c.vocab_size, c.hidden_size, scale=c.embedding_scale)
        self.layers = [self.layer(c, body / f"layers.{i}", i) for i in range(c.num_hidden_layers)]
        self.norm: Apply = c.norm(body / "norm", c.hidden_size)
        self.head = head(scope, c.hidden_size, c.vocab_size, self.embed.weight if c.tie_word_embeddings else None)
        self.logit_cap, self.logit_scale = c.logit_cap, c.logit_scale

    def __call__(self, inputs: Inputs) -> Value:
        """Record the model and return the logits of the rows that sample, (samples, vocabulary)."""
        x = self.run(inputs, self.embed(inputs.ids))
        logits = scaled(self.head(self.norm(take_rows(x))), self.logit_scale)
        return soft_cap(logits, self.logit_cap) if self.logit_cap else logits

    def run(self, inputs: Inputs, x: Value) -> Value:
        """Apply the layers to their first input, (tokens, hidden); the result has the same shape."""
        for layer in self.layers:
            x = layer(x)
        return x
