"""OLMo: Llama with LayerNorm that has no weights."""

from __future__ import annotations

from typing import Annotated

import msgspec

from tokenmill.layers.scope import Scope
from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, Model, Size
from tokenmill.program import ops
from tokenmill.program.value import Value

__all__ = ["Config", "Model"]


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' OlmoConfig."""

    has_mlp_bias = False

    vocab_size: Size = 50304
    max_position_embeddings: Length | None = 2048
    clip_qkv: Annotated[float, msgspec.Meta(gt=0)] | None = None

    @property
    def clip(self) -> float:
        """Bound of queries, keys and values, after norms and before the rotation; 0: none."""
        return self.clip_qkv or 0.0

    def norm(self, scope: Scope, width: int, *, per_head: bool = False) -> Apply:
        """Return the norm, which reads nothing of the checkpoint."""
        return plain_norm


def plain_norm(x: Value) -> Value:
    """Apply LayerNorm without weight and bias."""
    return x.record(ops.Norm, x=x, weight=None, eps=1e-5, center=True)
