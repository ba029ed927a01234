"""nanochat: norms without weights, also of queries and keys after the rotation, which turns the other way."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from tokenmill.layers.attention import Rope
from tokenmill.layers.mlp import Mlp
from tokenmill.layers.norm import unweighted_norm
from tokenmill.layers.scope import Scope
from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Act, Apply, Size
from tokenmill.program.value import Inputs, Value


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' NanoChatConfig."""

    has_mlp_bias = False

    vocab_size: Size = 50304
    hidden_size: Size = 768
    intermediate_size: Size = 8192
    num_hidden_layers: llama.Layers = 12
    num_attention_heads: Size = 6
    hidden_act: Act = "relu2"
    max_position_embeddings: Length | None = 2048
    final_logit_softcapping: Annotated[float, msgspec.Meta(gt=0)] | None = 15.0

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for a scaled rotation."""
        super().__post_init__()
        if (self.rope_scaling or {}).get("rope_type", "default") != "default":
            raise ValueError("`rope_scaling` is set, but this model type is served without; leave it out")

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary embedding, with frequencies of the other sign."""
        against = {"rope_type": "factors", "factors": [-1.0] * (self.rotary_dim // 2)}
        return Rope(self.head_size, self.rope_theta, self.rope.table.max_position, against)

    def norm(self, scope: Scope, width: int, *, per_head: bool = False) -> Apply:
        """Return a norm, which reads nothing of the checkpoint."""
        return lambda x: unweighted_norm(x, self.rms_norm_eps, width if per_head else 0)

    @property
    def logit_cap(self) -> float:
        """Soft cap of the logits; 0: none."""
        return self.final_logit_softcapping or 0.0


class Attention(llama.Attention):
    """Llama's attention, with norms of query and key heads after the rotation."""

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.head_norm = c.norm(scope, self.head_dim, per_head=True)

    def heads(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Rotate and normalize queries and keys."""
        q, k = super().heads(q, k)
        return self.head_norm(q), self.head_norm(k)


class Layer(llama.Layer):
    """Llama's decoder layer, with this file's attention and a feed-forward layer without a gate."""

    attention = Attention

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer."""
        return Mlp(scope / "mlp", c.hidden_size, c.intermediate_size, c.act, ("fc1", "fc2"))


class Model(llama.Model):
    """Llama's model, with this file's decoder layers and a norm before the first one."""

    layer = Layer

    def run(self, inputs: Inputs, x: Value) -> Value:
        """Apply a norm, then the layers."""
        return super().run(inputs, self.norm(x))
