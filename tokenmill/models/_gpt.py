"""Base of the GPT-like architectures: LayerNorm, a feed-forward layer without a gate, fused queries, keys and values.

An architecture is a `Config` that names the checkpoint's modules (`Names`) and overrides properties. It overrides a
method of a layer only where it computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
from msgspec import field

from tokenmill.layers.attention import Rope, attend
from tokenmill.layers.embedding import Embedding
from tokenmill.layers.linear import Linear, Linears, head, interleaved
from tokenmill.layers.mlp import GatedMlp, Mlp, clipped, scaled, take_rows
from tokenmill.layers.norm import LayerNorm, RmsNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import base
from tokenmill.models.base import Length
from tokenmill.models.llama import Biases, Size
from tokenmill.program.ops import Part
from tokenmill.program.value import Inputs, Value

__all__ = [
    "Act", "Biases", "Config", "Gpt2Fields", "Layers", "Length", "Model", "Names", "RotaryFields", "Size", "Theta",
    "field",
]  # fmt: skip

Theta = Annotated[float, msgspec.Meta(gt=0)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
Act = Literal[
    "silu", "swish", "relu", "relu2", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate",
    "gelu_pytorch_tanh", "gelu_python_tanh",
]  # fmt: skip
_SAME_ACTS = {
    "swish": "silu", "gelu_python": "gelu", "gelu_fast": "gelu_new", "gelu_accurate": "gelu_new",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}  # fmt: skip
"""transformers' name of an activation -> the name that backends use"""


class Names(NamedTuple):
    """The checkpoint's names of modules: those of the whole model, then those within a layer."""

    embed: str
    layers: str
    norm: str
    positions: str = ""  # table of learned positions; "": none
    head: str = "lm_head"
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"  # "": attention and feed-forward layer share the first norm
    attention: str = "attention"
    qkv: tuple[str, ...] = ("query_key_value",)  # one name if they are fused
    output: str = "dense"
    mlp: str = "mlp"
    inner: tuple[str, str] = ("dense_h_to_4h", "dense_4h_to_h")


class Config(base.Config, kw_only=True):
    """Fields and properties that all these architectures have. Derived classes give the defaults of transformers."""

    names: ClassVar[Names]
    transposed: ClassVar[bool] = False  # matrices are stored (inputs, outputs)
    parallel: ClassVar[bool] = False  # attention and feed-forward layer read the same input

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that are inconsistent."""
        if self.max_position_embeddings is None:
            raise ValueError("the maximum number of positions is null; give a number")
        if self.head_size * self.num_attention_heads < self.hidden_size and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} key-value heads for {self.num_attention_heads} heads")
        rotary = self.rope.table.rotary_dim if self.rope else 2
        if rotary % 2 or not 0 < rotary <= self.head_size:
            raise ValueError(f"{rotary} rotary columns of heads of {self.head_size}; give an even number of them")

    @property
    def length(self) -> int:
        """Maximum length of a sequence in tokens, before RoPE scaling."""
        assert self.max_position_embeddings is not None
        return self.max_position_embeddings

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Number of columns of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def inner(self) -> int:
        """Number of columns within the feed-forward layer."""
        return 4 * self.hidden_size

    @property
    def activation(self) -> str:
        """Activation of the feed-forward layer, by its name in transformers."""
        return "gelu_new"

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return 1e-5

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases(True, True, True)

    @property
    def head_bias(self) -> bool:
        """True if the output layer has a bias."""
        return False

    @property
    def logit_factor(self) -> float:
        """Factor of the logits."""
        return 1.0

    @property
    def rope(self) -> Rope | None:
        """Rotary embedding of queries and keys; None if there is none."""
        return None

    @property
    def alibi(self) -> tuple[float, ...]:
        """Slopes of ALiBi, one for each head; () if there is none."""
        return ()

    @property
    def clip(self) -> float:
        """Bound of queries, keys and values; 0: none."""
        return 0.0

    @property
    def qkv(self) -> Mapping[str, int | tuple[int, ...] | tuple[Part, ...]]:
        """Return the sizes of query, key and value by their names; one name means that they are stored fused."""
        d = self.head_size
        sizes = self.num_attention_heads * d, self.kv_heads * d, self.kv_heads * d
        names = self.names.qkv
        return {names[0]: sizes} if len(names) == 1 else dict(zip(names, sizes, strict=True))

    @property
    def qkv_by_head(self) -> Mapping[str, tuple[Part, ...]]:
        """Return the parts of a fused matrix that holds query, key and value of one key-value head after another."""
        d = self.head_size
        shared = self.num_attention_heads // self.kv_heads
        return {self.names.qkv[0]: interleaved(self.kv_heads, shared * d, d, d)}

    @property
    def max_positions(self) -> int:
        """See `base.Config`."""
        return self.rope.table.longest if self.rope else super().max_positions

    @property
    def exact_prompt(self) -> int:
        """See `base.Config`."""
        return self.rope.table.exact_prompt if self.rope else super().exact_prompt

    @property
    def unstretched(self) -> int:
        """See `base.Config`."""
        return self.length

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens; 0: all tokens."""
        return 0

    def rotates(self, layer: int) -> bool:
        """Return True if a layer rotates its queries and keys."""
        return self.rope is not None

    def scale(self, layer: int) -> float:
        """Return the factor of a layer's attention scores."""
        return float(self.head_size**-0.5)

    def norm(self, scope: Scope, width: int) -> LayerNorm | RmsNorm:
        """Return a norm of the model."""
        return LayerNorm(scope, width, self.eps)

    def head_norms(self, scope: Scope) -> tuple[LayerNorm, LayerNorm] | None:
        """Return the norms of queries and keys before the rotation; None if there are none."""
        return None

    def mlp(self, scope: Scope) -> Mlp | GatedMlp:
        """Return the feed-forward layer."""
        return Mlp(
            scope, self.hidden_size, self.inner, same_act(self.activation), self.names.inner,
            bias=self.biases.mlp, transposed=self.transposed,
        )  # fmt: skip


class RotaryFields(Config, kw_only=True):
    """Fields of config.json that Llama introduced and later architectures kept. Derived classes give the defaults."""

    interleaved: ClassVar[bool] = False  # the rotation pairs adjacent columns

    intermediate_size: Size
    hidden_act: Act
    num_key_value_heads: Size | None = None  # None: num_attention_heads
    rope_theta: Theta = 10000.0
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    tie_word_embeddings: bool = False

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def inner(self) -> int:
        """Number of columns within the feed-forward layer."""
        return self.intermediate_size

    @property
    def activation(self) -> str:
        """Activation of the feed-forward layer, by its name in transformers."""
        return self.hidden_act

    @property
    def rope(self) -> Rope:
        """Rotary embedding of queries and keys."""
        rotary_dim = int(self.head_size * self.partial_rotary_factor)
        return Rope(
            self.head_size, self.rope_theta, self.length, self.rope_scaling, rotary_dim, interleaved=self.interleaved
        )

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases()


class Gpt2Names:
    """Methods of configurations that name the activation and the norms' epsilon as GPT-2 does."""

    activation_function: str
    layer_norm_epsilon: float

    @property
    def activation(self) -> str:
        """Activation of the feed-forward layer, by its name in transformers."""
        return self.activation_function

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.layer_norm_epsilon


class Gpt2Fields(Gpt2Names, Config, kw_only=True):
    """Fields of config.json that GPT-2 introduced and later architectures kept, with GPT-2's defaults."""

    mapped = frozenset({"hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"})

    vocab_size: Size = 50257
    hidden_size: Size = field(default=768, name="n_embd")
    num_hidden_layers: Layers = field(default=12, name="n_layer")
    num_attention_heads: Size = field(default=12, name="n_head")
    max_position_embeddings: Length | None = field(default=1024, name="n_positions")
    n_inner: Size | None = None
    activation_function: Act = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    @property
    def inner(self) -> int:
        """Number of columns within the feed-forward layer."""
        return self.n_inner or 4 * self.hidden_size


def same_act(name: str) -> str:
    """Return the name that backends use for an activation of transformers."""
    return _SAME_ACTS.get(name, name)


class Attention:
    """Attention of one layer, with rotation or ALiBi if the model has it."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        self.qkv = Linears(
            scope, c.hidden_size, shard="column", unit=c.head_size, bias=c.biases.qkv, transposed=c.transposed,
            outputs=c.qkv,
        )  # fmt: skip
        self.out = Linear(
            scope, c.num_attention_heads * c.head_size, c.names.output, c.hidden_size, shard="row",
            bias=c.biases.output, transposed=c.transposed,
        )  # fmt: skip
        self.norms = c.head_norms(scope)
        self.rope = c.rope if c.rotates(layer) else None
        self.layer, self.head_dim, self.alibi, self.clip = layer, c.head_size, c.alibi, c.clip
        self.window, self.scale = c.window(layer), c.scale(layer)

    def norm(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Normalize queries and keys before the rotation, if the model does."""
        return (q, k) if self.norms is None else (self.norms[0](q), self.norms[1](k))

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        q, k, v = (clipped(part, self.clip) for part in self.qkv(x))
        q, k = self.norm(q, k)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        heads = attend(
            q, k, v, layer=self.layer, head_dim=self.head_dim, scale=self.scale, window=self.window, alibi=self.alibi
        )
        return self.out(heads)


class Layer:
    """Decoder layer: attention and feed-forward layer, one after the other or, if `parallel`, of the same input."""

    attention = Attention

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        self.norm1 = c.norm(scope / c.names.norm1, c.hidden_size)
        self.attn = self.attention(c, scope / c.names.attention, layer)
        self.norm2 = c.norm(scope / c.names.norm2, c.hidden_size) if c.names.norm2 else None
        self.mlp = c.mlp(scope / c.names.mlp if c.names.mlp else scope)
        self.parallel = c.parallel

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        normed = self.norm1(x)
        if self.parallel:
            return x + self.attn(normed) + self.mlp(self.norm2(x) if self.norm2 else normed)
        assert self.norm2 is not None, "a layer without a second norm is parallel"
        x = x + self.attn(normed)
        return x + self.mlp(self.norm2(x))


class Model:
    """Complete model: from token ids to the logits of the rows that sample."""

    layer = Layer

    def __init__(self, c: Config, scope: Scope) -> None:
        names = c.names
        self.embed = Embedding(scope / names.embed, c.vocab_size, c.hidden_size)
        self.positions = None
        if names.positions:
            self.positions = Embedding(scope / names.positions, c.max_positions, c.hidden_size, shard="none")
        self.layers = [self.layer(c, scope / names.layers / f"{i}", i) for i in range(c.num_hidden_layers)]
        self.norm = c.norm(scope / names.norm, c.hidden_size)
        tied = self.embed.weight if c.tie_word_embeddings else None
        self.head = head(scope, c.hidden_size, c.vocab_size, tied, name=names.head, bias=c.head_bias)
        self.logit_factor = c.logit_factor

    def begin(self, inputs: Inputs) -> Value:
        """Record the input of the first layer, (tokens, hidden)."""
        x = self.embed(inputs.ids)
        return x if self.positions is None else x + self.positions(inputs.positions)

    def __call__(self, inputs: Inputs) -> Value:
        """Record the model and return the logits of the rows that sample, (samples, vocabulary)."""
        x = self.begin(inputs)
        for layer in self.layers:
            x = layer(x)
        return scaled(self.head(self.norm(take_rows(x))), self.logit_factor)
