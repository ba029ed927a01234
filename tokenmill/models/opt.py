"""OPT: learned positions from the third row of their table on; in some sizes norms behind the layers, narrow tables."""

from __future__ import annotations

from tokenmill.layers.embedding import Embedding
from tokenmill.layers.linear import Linear, head
from tokenmill.layers.mlp import take_rows
from tokenmill.layers.scope import Scope
from tokenmill.models import _gpt
from tokenmill.models._gpt import Act, Biases, Layers, Length, Names, Size, field
from tokenmill.program.value import Inputs, Value

_OFFSET = 2  # rows of the position table before that of the first position


class Config(_gpt.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' OPTConfig."""

    names = Names(
        "model.decoder.embed_tokens", "model.decoder.layers", "model.decoder.final_layer_norm",
        norm1="self_attn_layer_norm", norm2="final_layer_norm", attention="self_attn",
        qkv=("q_proj", "k_proj", "v_proj"), output="out_proj", mlp="", inner=("fc1", "fc2"),
    )  # fmt: skip

    vocab_size: Size = 50272
    hidden_size: Size = 768
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    max_position_embeddings: Length | None = 2048
    ffn_dim: Size = 3072
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = field(default=False, name="_remove_final_layer_norm")
    word_embed_proj_dim: Size | None = None
    activation_function: Act = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that are inconsistent or not supported."""
        super().__post_init__()
        if not self.layer_norm_elementwise_affine:
            raise ValueError("`layer_norm_elementwise_affine` is false, but norms without weights are not served")

    @property
    def inner(self) -> int:
        """Number of columns within the feed-forward layer."""
        return self.ffn_dim

    @property
    def activation(self) -> str:
        """Activation of the feed-forward layer, by its name in transformers."""
        return self.activation_function

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases(self.enable_bias, self.enable_bias, self.enable_bias)


class Layer(_gpt.Layer):
    """Decoder layer, with the norms before or behind attention and feed-forward layer."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.norms_first = c.do_layer_norm_before

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        if self.norms_first:
            return super().__call__(x)
        assert self.norm2 is not None
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Model:
    """Complete model: from token ids to the logits of the rows that sample."""

    def __init__(self, c: Config, scope: Scope) -> None:
        body, narrow = scope / "model.decoder", c.word_embed_proj_dim or c.hidden_size
        self.embed = Embedding(scope / c.names.embed, c.vocab_size, narrow)
        self.positions = Embedding(
            body / "embed_positions", c.max_positions, c.hidden_size, shard="none", offset=_OFFSET
        )
        projected = narrow != c.hidden_size
        self.project_in = Linear(body, narrow, "project_in", c.hidden_size) if projected else None
        self.project_out = Linear(body, c.hidden_size, "project_out", narrow) if projected else None
        self.layers = [Layer(c, scope / c.names.layers / f"{i}", i) for i in range(c.num_hidden_layers)]
        normed = c.do_layer_norm_before and not c.remove_final_layer_norm
        self.norm = c.norm(scope / c.names.norm, c.hidden_size) if normed else None
        self.head = head(scope, narrow, c.vocab_size, self.embed.weight if c.tie_word_embeddings else None)

    def __call__(self, inputs: Inputs) -> Value:
        """Record the model and return the logits of the rows that sample, (samples, vocabulary)."""
        x = self.embed(inputs.ids)
        x = (x if self.project_in is None else self.project_in(x)) + self.positions(inputs.positions)
        for layer in self.layers:
            x = layer(x)
        x = take_rows(x)
        x = x if self.norm is None else self.norm(x)
        return self.head(x if self.project_out is None else self.project_out(x))
