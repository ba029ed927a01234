"""SmolLM 3: Llama without rotation on every fourth layer."""

from __future__ import annotations

from tokenmill.layers.attention import Rope
from tokenmill.models import _windows, llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Model, Size

__all__ = ["Config", "Model"]


class Config(_windows.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' SmolLM3Config."""

    vocab_size: Size = 128256
    hidden_size: Size = 2048
    num_hidden_layers: llama.Layers = 36
    num_attention_heads: Size = 16
    num_key_value_heads: Size | None = 4
    max_position_embeddings: Length | None = 32768
    rope_theta: llama.Theta = 2000000.0
    tie_word_embeddings: bool = True
    use_sliding_window: bool = False
    sliding_window: Length | None = None
    no_rope_layers: list[int] | None = None
    """For each layer 1 if it rotates, else 0. None: each but every `no_rope_layer_interval`-th rotates."""
    no_rope_layer_interval: Size = 4

    def rotates(self, layer: int) -> bool:
        """Return True for a layer with rotary embedding."""
        if self.no_rope_layers is not None:
            return bool(self.no_rope_layers[layer])
        return (layer + 1) % self.no_rope_layer_interval != 0

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary embedding of a layer; None if it has no positions."""
        return self.rope if self.rotates(layer) else None

    def default_kind(self, layer: int) -> _windows.Kind:
        """Return that a layer without rotation has the window, if one is used."""
        slides = self.use_sliding_window and self.sliding_window is not None and not self.rotates(layer)
        return "sliding_attention" if slides else "full_attention"

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        if self.no_rope_layers is not None and len(self.no_rope_layers) != self.num_hidden_layers:
            raise ValueError(f"{len(self.no_rope_layers)} no_rope_layers for {self.num_hidden_layers} layers")
        super().__post_init__()
        if not self.use_sliding_window and "sliding_attention" in (self.layer_types or ()):
            raise ValueError(
                "`layer_types` names sliding_attention, but no window is used; set `use_sliding_window` to true, or "
                "leave `layer_types` out"
            )
