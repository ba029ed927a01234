"""Parts of Gemma 3n and 4: an embedding for each layer, and layers that share the cache of another one."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from tokenmill.layers.attention import attend
from tokenmill.layers.embedding import Embedding
from tokenmill.layers.linear import Linear, Linears
from tokenmill.layers.mlp import act, scaled, times
from tokenmill.layers.norm import RmsNorm, unweighted_norm
from tokenmill.layers.scope import Scope
from tokenmill.models import _windows, llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Act, HeadDim, Size
from tokenmill.program import special
from tokenmill.program.value import Inputs, Value

Natural = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
Cap = Annotated[float, msgspec.Meta(gt=0)]


class Config(_windows.TwoRopes, kw_only=True):
    """Fields that both have, with the defaults that are theirs."""

    tie_word_embeddings: bool = True
    head_dim: HeadDim | None = 256
    num_attention_heads: Size = 8
    hidden_act: Act = msgspec.field(default="gelu_pytorch_tanh", name="hidden_activation")
    sliding_window: Length | None = 512
    final_logit_softcapping: Cap | None = None
    rope_theta: llama.Theta = 1000000.0
    rope_local_base_freq: llama.Theta = 10000.0
    rope_local_scaling: dict[str, Any] | None = None
    vocab_size_per_layer_input: Size = 262144
    hidden_size_per_layer_input: Natural = 256
    num_kv_shared_layers: Natural = 0

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or if a layer is to use a cache that no layer writes."""
        super().__post_init__()
        kept = [self.kind(layer) for layer in range(self.writers)]
        for layer in range(self.writers, self.num_hidden_layers):
            if self.kind(layer) not in kept:
                raise ValueError(
                    f"`num_kv_shared_layers` is {self.num_kv_shared_layers}, but no layer of {self.kind(layer)} is left"
                )

    @property
    def writers(self) -> int:
        """Number of layers, from the first, that have keys and values of their own."""
        return max(self.num_hidden_layers - self.num_kv_shared_layers, 0)

    def writer(self, layer: int) -> int:
        """Return the layer whose keys and values a layer uses."""
        if layer < self.writers:
            return layer
        return max(other for other in range(self.writers) if self.kind(other) == self.kind(layer))

    def heads_of(self, layer: int) -> tuple[int, int]:
        """Return the columns of a layer's heads, and the number of its key-value heads."""
        return self.head_size, self.kv_heads

    def values_are_keys(self, layer: int) -> bool:
        """Return True if the values of a layer are made from the products of its keys."""
        return False

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings."""
        return float(self.hidden_size**0.5)

    @property
    def logit_cap(self) -> float:
        """Soft cap of the logits; 0: none."""
        return self.final_logit_softcapping or 0.0


class Attention:
    """Attention with norms on all heads. `source`: the layer whose keys and values are used; None: own ones."""

    source: Attention | None = None

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        self.head_dim, kv_heads = c.heads_of(layer)
        q, kv = c.num_attention_heads * self.head_dim, kv_heads * self.head_dim
        self.owns, self.one = c.writer(layer) == layer, c.values_are_keys(layer)
        names = ("k_proj",) if self.one else ("k_proj", "v_proj")
        outputs = {"q_proj": q, **dict.fromkeys(names if self.owns else (), kv)}
        bias, heads = c.attention_bias, (c.num_attention_heads, kv_heads)
        self.qkv = Linears(
            scope, c.hidden_size, shard="column", unit=self.head_dim, heads=heads, bias=bias, outputs=outputs
        )
        self.out = Linear(scope, q, "o_proj", c.hidden_size, shard="row", bias=bias)
        self.eps, self.rope = c.rms_norm_eps, c.rope_of(layer)
        self.layer, self.window = c.writer(layer), c.window(layer)
        self.q_norm, self.k_norm = (
            RmsNorm(scope / name, self.head_dim, self.eps, per_head=True) for name in ("q_norm", "k_norm")
        )
        self.kept: tuple[Value, Value] | None = None

    def keys_and_values(self, k: Value, v: Value) -> tuple[Value, Value]:
        """Normalize and rotate."""
        assert self.rope is not None
        return self.rope(self.k_norm(k)), unweighted_norm(v, self.eps, self.head_dim)

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        q, *kv = self.qkv(x)
        assert self.rope is not None
        q = self.rope(self.q_norm(q))
        self.kept = self.keys_and_values(kv[0], kv[-1]) if self.source is None else self.source.kept
        assert self.kept is not None
        k, v = self.kept
        return self.out(attend(q, k, v, layer=self.layer, head_dim=self.head_dim, scale=1.0, window=self.window))


def share(c: Config, layers: list[Any]) -> None:
    """Connect the layers without keys and values of their own to those whose they use."""
    for i in range(c.writers, len(layers)):
        layers[i].attn.source = layers[c.writer(i)].attn


class LayerInputs:
    """Inputs of all layers beside the residual: an embedding of the token, and a product of the first layer's input."""

    def __init__(self, c: Config, scope: Scope) -> None:
        width = c.hidden_size_per_layer_input
        wide, rows = width * c.num_hidden_layers, c.vocab_size_per_layer_input
        self.table = Embedding(scope / "embed_tokens_per_layer", rows, wide, scale=width**0.5)
        self.project = Linear(scope, c.hidden_size, "per_layer_model_projection", wide)
        self.norm = RmsNorm(scope / "per_layer_projection_norm", width, c.rms_norm_eps, per_head=True)
        self.widths, self.scale = [width] * c.num_hidden_layers, c.hidden_size**-0.5
        self.rows = rows if rows < c.vocab_size else 0

    def __call__(self, inputs: Inputs, x: Value) -> list[Value]:
        """Return the input of each layer."""
        ids = inputs.ids
        if self.rows:
            ids = ids.tape.new(ids.spec.rows, 1, "ids")
            ids.tape.ops.append(special.Within(out=ids, ids=inputs.ids, rows=self.rows))
        made = self.norm(scaled(self.project(x), self.scale)) + self.table(ids)
        return scaled(made, 2**-0.5).split(*self.widths)


class LayerInput:
    """Addition of a layer to the residual that is made from its own input."""

    def __init__(self, c: Config, scope: Scope) -> None:
        width = c.hidden_size_per_layer_input
        self.gate = Linear(scope, c.hidden_size, "per_layer_input_gate", width)
        self.project = Linear(scope, width, "per_layer_projection", c.hidden_size)
        self.norm, self.act = RmsNorm(scope / "post_per_layer_input_norm", c.hidden_size, c.rms_norm_eps), c.act

    def __call__(self, x: Value, own: Value) -> Value:
        """Return the addition for the residual x, (tokens, hidden), and the layer's input."""
        return self.norm(self.project(times(act(self.gate(x), self.act), own)))
