"""EXAONE 4: norms as in OLMo 2 but on query and key heads, and no rotation on layers without a sliding window."""

from __future__ import annotations

from tokenmill.layers.attention import Rope
from tokenmill.models import _windows, llama, olmo2, qwen3
from tokenmill.models.base import Length
from tokenmill.models.llama import Biases, Size


class Config(_windows.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Exaone4Config."""

    vocab_size: Size = 102400
    intermediate_size: Size = 16384
    num_key_value_heads: Size | None = 32
    max_position_embeddings: Length | None = 2048
    rms_norm_eps: float = 1e-5
    sliding_window_pattern: int | str | None = 4
    """Layers of a period, of which the last has no window; or a letter for each layer of it, L with a window or G."""

    def default_kind(self, layer: int) -> _windows.Kind:
        """Return the kind of a layer by the pattern. The last layer has no window if the pattern is of letters."""
        pattern = self.sliding_window_pattern
        if self.sliding_window is None or not pattern:
            return "full_attention"
        if isinstance(pattern, int):
            return _windows.every(pattern, layer)
        local = pattern[layer % len(pattern)] == "L" and layer + 1 < self.num_hidden_layers
        return "sliding_attention" if local else "full_attention"

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary embedding of a layer; None if it has no positions."""
        return self.rope if self.sliding_window is None or self.window(layer) else None

    @property
    def biases(self) -> Biases:
        """Return that no product has a bias, regardless of config.json."""
        return Biases()


class Layer(olmo2.Layer):
    """OLMo 2's decoder layer, with norms on query and key heads."""

    attention = qwen3.Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
