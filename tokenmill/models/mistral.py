"""Mistral: Llama, in some versions with a sliding window on every layer."""

from __future__ import annotations

from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Biases, Model, Size

__all__ = ["Config", "Model"]


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' MistralConfig."""

    intermediate_size: Size = 14336
    max_position_embeddings: Length | None = 4096 * 32
    num_key_value_heads: Size | None = 8
    sliding_window: Length | None = 4096
    layer_types: list[str] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for a sliding window on only some of the layers."""
        super().__post_init__()
        one = "full_attention" if self.sliding_window is None else "sliding_attention"
        if not set(self.layer_types or ()) <= {one}:
            raise ValueError(
                f"`layer_types` names {', '.join(sorted(set(self.layer_types or ())))}, but with this `sliding_window` "
                f"each layer of this model type is of {one}; leave `layer_types` out"
            )

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens; 0: all tokens."""
        return self.sliding_window or 0

    @property
    def biases(self) -> Biases:
        """Return that no product has a bias, regardless of config.json."""
        return Biases()
