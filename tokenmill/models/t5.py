"""T5: an encoder and a decoder, with a bias by distance in place of positions."""

from __future__ import annotations

from typing import ClassVar, Literal

from tokenmill.layers.embedding import Embedding
from tokenmill.layers.linear import Linear, Linears, head
from tokenmill.layers.mlp import GatedMlp, Mlp, scaled, take_rows
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import base
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, Layers, Size, act_of
from tokenmill.program.encoded import (
    CrossAttention,
    DecoderAttention,
    EncoderAttention,
    RelativeBias,
    StoreInput,
    input_ids,
)
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Inputs, Value

FeedForward = Literal["relu", "gelu", "gelu_new", "silu", "gated-gelu", "gated-gelu_new", "gated-silu", "gated-relu"]


class Config(base.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' T5Config."""

    bias_in_each_layer: ClassVar[bool] = False  # else in the first, for all

    vocab_size: Size = 32128
    d_model: Size = 512
    d_kv: Size = 64
    d_ff: Size = 2048
    num_layers: Layers = 6
    num_decoder_layers: Layers | None = None  # None: num_layers
    num_heads: Size = 8
    relative_attention_num_buckets: Size = 32
    relative_attention_max_distance: Size = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: FeedForward = "relu"
    n_positions: Length = 512  # of the tokens that it was trained with; there is no limit
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None  # transformers 5 writes it; None: tie_word_embeddings

    def __post_init__(self) -> None:
        """Raise ValueError for buckets that do not divide into two sides of two halves. Replace float16 by bfloat16."""
        if self.dtype != "float32":
            self.dtype = "bfloat16"  # Activations of T5 exceed the range of float16, in which it may still be stored.
        if self.relative_attention_num_buckets % 4:
            raise ValueError(f"relative_attention_num_buckets is {self.relative_attention_num_buckets}, not 4 · n")

    @property
    def max_positions(self) -> int:
        """Maximum length of input and answer together; see `base.Config`."""
        return 2 * (self.max_position_embeddings or self.n_positions)

    @property
    def exact_prompt(self) -> int:
        """See `base.Config`."""
        return self.max_positions - 1

    @property
    def unstretched(self) -> int:
        """See `base.Config`."""
        return self.max_positions // 2

    @property
    def is_first_version(self) -> bool:
        """True for models whose output layer is the embedding, with its inputs scaled."""
        return self.tie_word_embeddings if self.scale_decoder_outputs is None else self.scale_decoder_outputs


class _Stack:
    """Parts that encoder and decoder share: products, norms and feed-forward layers."""

    def __init__(self, c: Config, scope: Scope, layers: int) -> None:
        self.config, self.scope, self.layers = c, scope, layers
        self.inner = c.num_heads * c.d_kv

    def part(self, layer: int, place: int) -> Scope:
        """Return the scope of a part of a layer."""
        return self.scope / f"block.{layer}" / f"layer.{place}"

    def norm(self, scope: Scope) -> RmsNorm:
        """Return a norm."""
        return RmsNorm(scope, self.config.d_model, self.config.layer_norm_epsilon)

    def bias(self, layer: int) -> RelativeBias:
        """Return the bias of a layer's attention."""
        c, holder = self.config, layer if self.config.bias_in_each_layer else 0
        name = self.part(holder, 0) / "SelfAttention" / "relative_attention_bias" / "weight"
        weight = Weight((Part(name, c.relative_attention_num_buckets),), c.num_heads, exact=True)
        return RelativeBias(weight, c.relative_attention_max_distance)

    def products(self, scope: Scope, *names: str) -> Linears:
        """Return the products of queries, keys or values."""
        outputs = dict.fromkeys(names, self.inner)
        return Linears(scope, self.config.d_model, shard="column", unit=self.config.d_kv, outputs=outputs)

    def output(self, scope: Scope) -> Linear:
        """Return the output product of an attention."""
        return Linear(scope, self.inner, "o", self.config.d_model, shard="row")

    def feed_forward(self, scope: Scope) -> Apply:
        """Return a feed-forward layer."""
        c, (first, _, second) = self.config, self.config.feed_forward_proj.partition("-")
        act = act_of("gelu_new" if c.feed_forward_proj == "gated-gelu" else second or first)
        if second:
            return GatedMlp(scope, c.d_model, c.d_ff, act, names=("wi_0", "wi_1", "wo"))
        return Mlp(scope, c.d_model, c.d_ff, act, ("wi", "wo"))

    def ended(self, x: Value, layer: int, place: int) -> Value:
        """Apply the feed-forward layer of a layer, which is its last part."""
        scope = self.part(layer, place)
        return x + self.feed_forward(scope / "DenseReluDense")(self.norm(scope / "layer_norm")(x))


class Encoder(_Stack):
    """The encoder: embedded ids of an input -> its result."""

    def __call__(self, x: Value) -> Value:
        """Record all layers."""
        c = self.config
        for layer in range(self.layers):
            scope = self.part(layer, 0)
            q, k, v = self.products(scope / "SelfAttention", "q", "k", "v")(self.norm(scope / "layer_norm")(x))
            bias, longest = self.bias(layer)
            y = q.record(
                EncoderAttention, q=q, k=k, v=v, head_dim=c.d_kv, scale=1.0, bias=bias, longest=longest
            )  # fmt: skip
            x = self.ended(x + self.output(scope / "SelfAttention")(y), layer, 1)
        return self.norm(self.scope / "final_layer_norm")(x)


class Decoder(_Stack):
    """The decoder: embedded tokens and the encoder's result -> what the output layer reads."""

    def store(self, encoded: Value) -> None:
        """Record what makes the keys and values of cross-attention from the encoder's result."""
        for layer in range(self.layers):
            k, v = self.products(self.part(layer, 1) / "EncDecAttention", "k", "v")(encoded)
            k.record(StoreInput, k=k, v=v, layer=layer)

    def __call__(self, x: Value) -> Value:
        """Record all layers."""
        c = self.config
        for layer in range(self.layers):
            scope, cross = self.part(layer, 0), self.part(layer, 1)
            q, k, v = self.products(scope / "SelfAttention", "q", "k", "v")(self.norm(scope / "layer_norm")(x))
            bias, longest = self.bias(layer)
            y = q.record(
                DecoderAttention, q=q, k=k, v=v, layer=layer, head_dim=c.d_kv, scale=1.0, bias=bias, longest=longest
            )  # fmt: skip
            x = x + self.output(scope / "SelfAttention")(y)
            (q,) = self.products(cross / "EncDecAttention", "q")(self.norm(cross / "layer_norm")(x))
            y = q.record(CrossAttention, q=q, layer=layer, head_dim=c.d_kv, scale=1.0)
            x = self.ended(x + self.output(cross / "EncDecAttention")(y), layer, 2)
        return self.norm(self.scope / "final_layer_norm")(x)


class Model:
    """Complete model: from an input and the tokens of an answer to the logits of the rows that sample."""

    def __init__(self, c: Config, scope: Scope) -> None:
        self.embed = Embedding(scope / "shared", c.vocab_size, c.d_model)
        self.encoder = Encoder(c, scope / "encoder", c.num_layers)
        self.decoder = Decoder(c, scope / "decoder", c.num_decoder_layers or c.num_layers)
        first = c.is_first_version
        self.head = head(scope, c.d_model, c.vocab_size, self.embed.weight if first else None)
        self.scale = c.d_model**-0.5 if first else 1.0

    def __call__(self, inputs: Inputs) -> Value:
        """Record the model and return the logits of the rows that sample, (samples, vocabulary)."""
        ids = input_ids(inputs.ids.tape)
        self.decoder.store(self.encoder(self.embed(ids)))
        x = self.decoder(self.embed(inputs.ids))
        return self.head(scaled(take_rows(x), self.scale))
