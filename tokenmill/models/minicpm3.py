"""MiniCPM 3: DeepSeek's attention to compressed rows, dense feed-forward layers, and scaled branches and logits."""

from __future__ import annotations

from typing import Annotated

import msgspec

from tokenmill.models import deepseek_v3
from tokenmill.models._moe import Natural
from tokenmill.models.base import Length
from tokenmill.models.deepseek_v3 import Model
from tokenmill.models.llama import HeadDim, Layers, Size

__all__ = ["Config", "Model"]

Positive = Annotated[float, msgspec.Meta(gt=0)]


class Config(deepseek_v3.Latent, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' MiniCPM3Config."""

    vocab_size: Size = 73448
    hidden_size: Size = 2560
    intermediate_size: Size = 6400
    num_hidden_layers: Layers = 62
    num_attention_heads: Size = 40
    num_key_value_heads: Size | None = 40
    max_position_embeddings: Length | None = 32768
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    kv_lora_rank: Size = 256
    q_lora_rank: Size | None = 768
    qk_nope_head_dim: Size = 64
    qk_rope_head_dim: HeadDim = 32
    v_head_dim: Size | None = None  # type: ignore[assignment]
    scale_emb: Positive = 12
    scale_depth: Positive | None = 1.4
    dim_model_base: Size | None = 256
    first_k_dense_replace: Natural = 1 << 12  # no layer has experts

    def __post_init__(self) -> None:
        """Fill in the width of values. Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        self.v_head_dim = self.v_head_dim or self.hidden_size // self.num_attention_heads

    @property
    def interleaved(self) -> bool:
        """True if a rotation pairs adjacent columns: it pairs halves."""
        return False

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings."""
        return self.scale_emb

    @property
    def branch_scale(self) -> float:
        """Factor of the results of attention and feed-forward layer, before they are added."""
        return 1.0 if self.scale_depth is None else self.scale_depth / float(self.num_hidden_layers**0.5)

    @property
    def logit_scale(self) -> float:
        """Factor of the logits."""
        return (self.dim_model_base or self.hidden_size) / self.hidden_size
