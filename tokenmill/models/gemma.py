"""Gemma: Llama with scaled embeddings and norms whose weights are stored minus one."""

from __future__ import annotations

from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Act, HeadDim, Model, Size

__all__ = ["Config", "Model"]


class Norms:
    """Methods of the configurations of all Gemmas: their norms, scaled embeddings and biases."""

    has_mlp_bias = False

    hidden_size: int
    rms_norm_eps: float
    attention_bias: bool

    def norm(self, scope: Scope, width: int, *, per_head: bool = False) -> RmsNorm:
        """Return a norm whose weight is stored minus one."""
        return RmsNorm(scope, width, self.rms_norm_eps, per_head=per_head, add=1.0)

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings."""
        return float(self.hidden_size**0.5)


def check_direction(both: bool | None) -> None:
    """Raise ValueError for a model that reads texts in both directions."""
    if both:
        raise ValueError("`use_bidirectional_attention` is set, but a model that generates text reads it forward only")


class Config(Norms, llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GemmaConfig."""

    tie_word_embeddings: bool = True
    head_dim: HeadDim | None = 256
    max_position_embeddings: Length | None = 8192
    use_bidirectional_attention: bool | None = None

    vocab_size: Size = 256000
    hidden_size: Size = 3072
    intermediate_size: Size = 24576
    num_hidden_layers: llama.Layers = 28
    num_attention_heads: Size = 16
    num_key_value_heads: Size | None = 16
    hidden_act: Act = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for a model that reads texts in both directions."""
        super().__post_init__()
        check_direction(self.use_bidirectional_attention)

    @property
    def act(self) -> str:
        """Return the activation of the feed-forward layer. The first releases name an approximation `gelu`."""
        return "gelu_pytorch_tanh" if self.hidden_act == "gelu" else super().act
