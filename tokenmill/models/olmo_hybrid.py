"""OLMo Hybrid: OLMo 3's attention in some layers, the gated delta rule in the others, whose norms come first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenmill.layers.attention import Rope
from tokenmill.layers.linear import Linear, Linears
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import llama, olmo2, qwen3_next
from tokenmill.models.base import Length
from tokenmill.models.llama import Size
from tokenmill.models.mamba import Kernel
from tokenmill.program.ops import Part, Weight


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' OlmoHybridConfig."""

    has_mlp_bias = False

    vocab_size: Size = 100352
    hidden_size: Size = 3840
    num_attention_heads: Size = 30
    max_position_embeddings: Length | None = 65536
    rope_theta: llama.Theta | None = 10000.0  # type: ignore[assignment]  # null: no rotation
    layer_types: list[str] | None = None
    linear_num_key_heads: Size | None = None  # None: num_attention_heads
    linear_num_value_heads: Size | None = None  # None: num_attention_heads
    linear_key_head_dim: Size | None = None
    linear_value_head_dim: Size | None = None
    linear_conv_kernel_dim: Kernel = 4
    linear_allow_neg_eigval: bool = True

    def __post_init__(self) -> None:
        """Fill in the sizes of linear attention. Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        self.linear_num_key_heads = self.linear_num_key_heads or self.num_attention_heads
        self.linear_num_value_heads = self.linear_num_value_heads or self.num_attention_heads
        default = int(0.75 * self.hidden_size / self.linear_num_key_heads)
        self.linear_key_head_dim = self.linear_key_head_dim or default
        self.linear_value_head_dim = self.linear_value_head_dim or 2 * self.linear_key_head_dim
        qwen3_next.check_layers(self.kinds, self.num_hidden_layers)
        qwen3_next.check_heads(self.linear_num_key_heads, self.linear_num_value_heads)

    @property
    def kinds(self) -> Sequence[str]:
        """Kind of each layer. By default every fourth is attention, and at least the last one."""
        last = self.num_hidden_layers - 1
        return self.layer_types or [qwen3_next.KINDS[i % 4 != 3 and (last > 2 or i < last)] for i in range(last + 1)]

    @property
    def rope(self) -> Rope:
        """Return the rotary embedding of attention, if it has one; else one that only states the length."""
        size, scaling = self.head_size, self.rope_scaling
        return Rope(size, self.rope_theta or 10000.0, self.max_position_embeddings or 65536, scaling)

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary embedding of a layer; None if it has no positions."""
        return self.rope if self.rope_theta is not None else None


class DeltaNet(qwen3_next.DeltaNet):
    """Qwen 3 Next's delta rule, with all projections and convolutions stored one by one."""

    def __init__(self, c: Any, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        widths = {"q_conv1d": self.keys, "k_conv1d": self.keys, "v_conv1d": self.values}
        parts = tuple(Part(scope / name / "weight", width) for name, width in widths.items())
        self.conv.weight = Weight(parts, c.linear_conv_kernel_dim)
        self.norm = RmsNorm(scope / "o_norm", c.linear_value_head_dim, 1e-5, per_head=True)
        self.out = Linear(scope, self.values, "o_proj", c.hidden_size)
        self.rate = 2.0 if c.linear_allow_neg_eigval else 1.0

    def project(self, c: Any, scope: Scope, heads: int) -> None:
        """Make the projection to columns that are convolved, gate, rates and decays."""
        outputs = {
            "q_proj": self.keys, "k_proj": self.keys, "v_proj": self.values, "g_proj": self.values, "b_proj": heads,
            "a_proj": heads,
        }  # fmt: skip
        self.inputs = Linears(scope, c.hidden_size, outputs=outputs)


class LinearLayer(llama.Layer):
    """Llama's decoder layer, with the delta rule."""

    def mixer(self, c: Any, scope: Scope, layer: int) -> DeltaNet:
        """Return the delta rule."""
        return DeltaNet(c, scope / "linear_attn", layer)


def layer_of(c: Config, scope: Scope, layer: int) -> llama.Layer:
    """Return a layer of its kind: OLMo 2's, or one with the delta rule."""
    return (olmo2.Layer if c.kinds[layer] == "full_attention" else LinearLayer)(c, scope, layer)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer: Any = staticmethod(layer_of)
