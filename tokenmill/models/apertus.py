"""Apertus: Llama with norms on query and key heads, and a feed-forward layer whose activation is trained."""

from __future__ import annotations

from typing import Any, Literal

from tokenmill.layers.linear import Linear
from tokenmill.layers.scope import Scope
from tokenmill.models import llama, qwen3
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, Size
from tokenmill.program import special
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Value

_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' ApertusConfig."""

    has_mlp_bias = False

    vocab_size: Size = 131072
    intermediate_size: Size = 14336
    hidden_act: Literal["xielu"] = "xielu"  # type: ignore[assignment]  # the only one that is published
    max_position_embeddings: Length | None = 65536
    rms_norm_eps: float = 1e-5
    rope_theta: llama.Theta = 12000000.0

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        if self.rope_scaling is None:
            self.rope_scaling = dict(_SCALING)
        super().__post_init__()


class Mlp:
    """Feed-forward layer: down(xielu(up(x)))."""

    def __init__(self, scope: Scope, width: int, inner: int) -> None:
        self.up = Linear(scope, width, "up_proj", inner, shard="column")
        self.down = Linear(scope, inner, "down_proj", width, shard="row")
        self.alphas = [Weight((Part(scope / "act_fn" / name, 1),)) for name in ("alpha_p", "alpha_n")]

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (rows, width); the result has the same shape."""
        y = self.up(x)
        return self.down(y.record(special.XIelu, x=y, alpha_p=self.alphas[0], alpha_n=self.alphas[1]))


class Layer(llama.Layer):
    """Llama's decoder layer, with other names, norms on heads and this file's feed-forward layer."""

    attention = qwen3.Attention

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.norm1 = c.norm(scope / "attention_layernorm", c.hidden_size)
        self.norm2 = c.norm(scope / "feedforward_layernorm", c.hidden_size)

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer."""
        return Mlp(scope / "mlp", c.hidden_size, c.intermediate_size)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
