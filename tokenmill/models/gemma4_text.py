"""Gemma 4: larger heads on layers without a window, and, in some sizes, experts, shared caches, inputs of layers."""

from __future__ import annotations

from math import inf
from typing import Any, Literal

from tokenmill.layers.attention import Rope
from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.scope import Scope
from tokenmill.models import _gemma, _gemma4_moe, _moe, _windows, llama
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import HeadDim, Size
from tokenmill.program import special
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Inputs, Value


class Config(_gemma.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Gemma4TextConfig."""

    rotates_whole_heads = False

    vocab_size: Size = 262144
    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: llama.Layers = 30
    num_key_value_heads: Size | None = 4
    max_position_embeddings: Length | None = 131072
    partial_rotary_factor: float = 0.25
    global_head_dim: HeadDim = 512
    num_global_key_value_heads: Size | None = None
    per_layer_config: dict[str, dict[str, Any]] | None = None  # by layer, in the files of transformers 5.20 and later
    attention_k_eq_v: bool = False
    use_double_wide_mlp: bool = False
    use_bidirectional_attention: Literal["vision"] | None = None
    enable_moe_block: bool = False
    num_experts: Count | None = None
    top_k_experts: Count | None = None
    moe_intermediate_size: Size | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        if self.layer_types:
            self.layer_types = [*self.layer_types[:-1], "full_attention"]
        if self.rope_scaling is None:
            self.rope_scaling = {"rope_type": "proportional"}
        super().__post_init__()
        if self.attention_k_eq_v and self.per_layer_config is None and self.num_global_key_value_heads is None:
            raise ValueError("`attention_k_eq_v` is set, but `num_global_key_value_heads` is null; give a number")
        if self.enable_moe_block:
            if not (self.num_experts and self.top_k_experts and self.moe_intermediate_size):
                raise ValueError(
                    "`enable_moe_block` is set: give `num_experts`, `top_k_experts` and `moe_intermediate_size`"
                )
            _moe.check_top_k(self.top_k_experts, self.num_experts)

    def default_kind(self, layer: int) -> _windows.Kind:
        """Return that the last of every six layers, and the last one, have no window."""
        return "full_attention" if layer + 1 == self.num_hidden_layers else _windows.every(6, layer)

    def heads_of(self, layer: int) -> tuple[int, int]:
        """Return the columns of a layer's heads, and the number of its key-value heads."""
        size, heads = self.head_size, self.kv_heads
        if self.per_layer_config is not None:
            own = self.per_layer_config.get(str(layer), {})
            return own.get("head_dim", size), own.get("num_key_value_heads", heads)
        if self.kind(layer) == "sliding_attention":
            return size, heads
        return self.global_head_dim, self.num_global_key_value_heads if self.attention_k_eq_v else heads  # type: ignore

    def values_are_keys(self, layer: int) -> bool:
        """Return True if the values of a layer are made from the products of its keys."""
        return self.attention_k_eq_v and self.kind(layer) == "full_attention"

    @property
    def rope(self) -> Rope:
        """Return the rotary embedding of layers without a window, by default of only the fastest frequencies."""
        size, _ = self.heads_of(self.num_hidden_layers - 1)
        length, scaling = self.max_position_embeddings or 0, dict(self.rope_scaling or {})
        if scaling.get("rope_type") == "proportional":
            turned = int(self.partial_rotary_factor * size // 2)
            factors = [float(scaling.get("factor", 1.0))] * turned + [inf] * (size // 2 - turned)
            scaling = {"rope_type": "factors", "factors": factors}
        return Rope(size, self.rope_theta, length, scaling)


class Layer:
    """Decoder layer: attention and feed-forward layer, each between two norms; the layer's own input; a factor."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        self.before1, self.after1, self.before2, self.after2 = (
            c.norm(scope / f"{name}_layernorm", c.hidden_size) for name in names
        )
        self.attn = _gemma.Attention(c, scope / "self_attn", layer)
        wide = c.use_double_wide_mlp and not self.attn.owns
        self.mlp = GatedMlp(scope / "mlp", c.hidden_size, c.intermediate_size * (1 + wide), c.act)
        self.experts: _gemma4_moe.Experts | None = None
        if c.enable_moe_block:
            self.experts = _gemma4_moe.Experts(c, scope)
            self.dense_norm = c.norm(scope / "post_feedforward_layernorm_1", c.hidden_size)
        self.own = _gemma.LayerInput(c, scope) if c.hidden_size_per_layer_input else None
        self.scalar = Weight((Part(scope / "layer_scalar", 1),))

    def __call__(self, x: Value, own: Value | None) -> Value:
        """Apply the layer to x, (tokens, hidden), and its own input; the result has the shape of x."""
        x = x + self.after1(self.attn(self.before1(x)))
        y = self.mlp(self.before2(x))
        if self.experts is not None:
            y = self.dense_norm(y) + self.experts(x)
        x = x + self.after2(y)
        if self.own is not None and own is not None:
            x = x + self.own(x, own)
        return x.record(special.ScaleByWeight, x=x, weight=self.scalar)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer: Any = Layer

    def __init__(self, c: Config, scope: Scope) -> None:
        super().__init__(c, scope)
        self.inputs = _gemma.LayerInputs(c, scope / "model") if c.hidden_size_per_layer_input else None
        _gemma.share(c, self.layers)

    def run(self, inputs: Inputs, x: Value) -> Value:
        """Apply the layers."""
        owns = self.inputs(inputs, x) if self.inputs is not None else [None] * len(self.layers)
        layers: Any = self.layers
        for layer, own in zip(layers, owns, strict=True):
            x = layer(x, own)
        return x
