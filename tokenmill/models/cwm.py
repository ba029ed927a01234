"""Code World Model: Llama with a sliding window on three of four layers."""

from __future__ import annotations

from tokenmill.models import _windows, llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Biases, HeadDim, Model, Size

__all__ = ["Config", "Model"]

_SCALING = {
    "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


class Config(_windows.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' CwmConfig."""

    vocab_size: Size = 128256
    hidden_size: Size = 6144
    intermediate_size: Size = 21504
    num_hidden_layers: llama.Layers = 64
    num_attention_heads: Size = 48
    num_key_value_heads: Size | None = 8
    head_dim: HeadDim | None = 128
    max_position_embeddings: Length | None = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: llama.Theta = 1000000.0
    sliding_window: Length | None = 8192

    def __post_init__(self) -> None:
        """Fill in the scaling of the rotation. Raise ValueError for inconsistent numbers."""
        if self.rope_scaling is None:
            self.rope_scaling = dict(_SCALING)
        super().__post_init__()

    def default_kind(self, layer: int) -> _windows.Kind:
        """Return that the first of every four layers has no window."""
        return "full_attention" if layer % 4 == 0 else "sliding_attention"

    @property
    def biases(self) -> Biases:
        """Return the biases: of the feed-forward layer, as config.json sets them."""
        return Biases(mlp=self.mlp_bias)
