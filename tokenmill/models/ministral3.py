"""Ministral 3: Mistral whose queries grow with the logarithm of the position."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.scope import Scope
from tokenmill.models import llama, mistral
from tokenmill.models.base import Length
from tokenmill.models.llama import HeadDim, Size
from tokenmill.program import special
from tokenmill.program.value import Value

SCALING = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_GROWTH = ("llama_4_scaling_beta", "original_max_position_embeddings")


def growth(scaling: dict[str, Any] | None) -> tuple[float, int]:
    """Return the factor and the length of the queries' growth. ValueError if the rope parameters lack them."""
    found = [(scaling or {}).get(name) for name in _GROWTH]
    for name, number in zip(_GROWTH, found, strict=True):
        if not isinstance(number, int | float):
            raise ValueError(f"the rope parameters have no number `{name}`, by which queries grow; add it")
    beta, length = found
    return float(beta), int(length)  # type: ignore[arg-type]


class Config(mistral.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Ministral3Config."""

    vocab_size: Size = 131072
    num_hidden_layers: llama.Layers = 34
    head_dim: HeadDim | None = 128
    max_position_embeddings: Length | None = 262144
    rms_norm_eps: float = 1e-5
    rope_theta: llama.Theta = 1000000.0
    sliding_window: Length | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or if the growth of queries is not stated."""
        if self.rope_scaling is None:
            self.rope_scaling = dict(SCALING)
        growth(self.rope_scaling)
        super().__post_init__()


class Attention(llama.Attention):
    """Llama's attention, with queries that grow with the position."""

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.beta, self.length = growth(c.rope_scaling)

    def heads(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Rotate queries and keys, then scale the queries."""
        q, k = super().heads(q, k)
        return q.record(special.ScaleByPosition, x=q, beta=self.beta, length=self.length), k


class Layer(llama.Layer):
    """Llama's decoder layer, with this file's attention."""

    attention = Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
