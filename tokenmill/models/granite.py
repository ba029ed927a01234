"""Granite: Llama with factors of embeddings, of attention's scores, of both branches and of the logits."""

from __future__ import annotations

from typing import Annotated

import msgspec

from tokenmill.models import llama
from tokenmill.models.llama import Model

__all__ = ["Config", "Model"]

Divisor = Annotated[float, msgspec.Meta(gt=0)]


class Factors:
    """Methods of the configurations of all Granites: their factors."""

    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings."""
        return self.embedding_multiplier

    @property
    def attention_scale(self) -> float:
        """Factor of the products of queries and keys."""
        return self.attention_multiplier

    @property
    def branch_scale(self) -> float:
        """Factor of the results of attention and feed-forward layer, before they are added."""
        return self.residual_multiplier

    @property
    def logit_scale(self) -> float:
        """Factor of the logits, of which config.json states the reciprocal."""
        return 1 / self.logits_scaling


class Config(Factors, llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GraniteConfig."""

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: Divisor = 1.0
