"""Mamba 2: Mamba with heads, each with one decay."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.mamba2 import Mamba2, Sizes
from tokenmill.layers.scope import Scope
from tokenmill.models import mamba
from tokenmill.models.llama import Apply, Layers, Size


def number(written: Any) -> float:
    """Return a number of config.json, in which transformers 5 writes infinity as {"__float__": "Infinity"}."""
    try:
        return float(written["__float__"] if isinstance(written, dict) else written)
    except (KeyError, TypeError):
        raise ValueError(f"`time_step_limit` has {written!r}, which is no number") from None


class Config(mamba.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Mamba2Config."""

    hidden_size: Size = 4096
    num_heads: Size = 128
    head_dim: Size = 64
    state_size: Size = 128
    num_hidden_layers: Layers = 64
    vocab_size: Size = 32768
    n_groups: Size = 8
    time_step_limit: tuple[Any, Any] = (0.0, float("inf"))
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that are inconsistent."""
        if self.inner != self.num_heads * self.head_dim:
            raise ValueError(
                f"{self.num_heads} heads of {self.head_dim} columns are not {self.inner}, `expand` times `hidden_size`"
            )
        if self.num_heads % self.n_groups:
            raise ValueError(f"{self.n_groups} groups do not divide {self.num_heads} heads")
        for limit in self.time_step_limit:
            number(limit)

    @property
    def sizes(self) -> Sizes:
        """Return the sizes of a mixer."""
        low, high = map(number, self.time_step_limit)
        return Sizes(
            self.hidden_size, self.num_heads, self.head_dim, self.state_size, self.n_groups, self.conv_kernel,
            self.layer_norm_epsilon, self.act, self.use_bias, self.use_conv_bias, (low, high), self.n_groups,
        )  # fmt: skip


class Layer(mamba.Layer):
    """Mamba's layer, with the mixer of Mamba 2."""

    def mixer(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the mixer."""
        return Mamba2(c.sizes, scope, layer)


class Model(mamba.Model):
    """Mamba's model, with this file's layers."""

    layer = Layer
