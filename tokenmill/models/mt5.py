"""mT5: T5 with an output layer of its own."""

from __future__ import annotations

from tokenmill.models import t5
from tokenmill.models.llama import Layers, Size
from tokenmill.models.t5 import FeedForward, Model

__all__ = ["Config", "Model"]


class Config(t5.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' MT5Config."""

    vocab_size: Size = 250112
    d_ff: Size = 1024
    num_layers: Layers = 8
    num_heads: Size = 6
    feed_forward_proj: FeedForward = "gated-gelu"

    @property
    def is_first_version(self) -> bool:
        """False, regardless of config.json."""
        return False
