"""Ministral: Mistral with a sliding window on the layers that config.json names."""

from __future__ import annotations

from tokenmill.models import _windows
from tokenmill.models.base import Length
from tokenmill.models.llama import Biases, Model, Size

__all__ = ["Config", "Model"]


class Config(_windows.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' MinistralConfig."""

    intermediate_size: Size = 14336
    max_position_embeddings: Length | None = 4096 * 32
    num_key_value_heads: Size | None = 8

    def default_kind(self, layer: int) -> _windows.Kind:
        """Return that each layer has the window, if there is one."""
        return "full_attention" if self.sliding_window is None else "sliding_attention"

    @property
    def biases(self) -> Biases:
        """Return that no product has a bias, regardless of config.json."""
        return Biases()
