"""Base of Llama-like architectures in which some layers have a sliding window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tokenmill.layers.attention import Rope
from tokenmill.models import llama
from tokenmill.models.base import Length

Kind = Literal["full_attention", "sliding_attention"]


class Config(llama.Config, kw_only=True):
    """Fields that name the layers with a window. Derived classes state which those are by default."""

    sliding_window: Length | None = 4096
    layer_types: list[Kind] | None = None

    def default_kind(self, layer: int) -> Kind:
        """Return the kind of a layer of a config.json that names none."""
        raise NotImplementedError

    def kind(self, layer: int) -> Kind:
        """Return the kind of a layer."""
        return self.default_kind(layer) if self.layer_types is None else self.layer_types[layer]

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens; 0: all tokens."""
        return (self.sliding_window or 0) if self.kind(layer) == "sliding_attention" else 0

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for layers that should have a window if there is none."""
        super().__post_init__()
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_types)} layer_types for {self.num_hidden_layers} layers")
        if self.sliding_window is None and any(
            self.kind(layer) == "sliding_attention" for layer in range(self.num_hidden_layers)
        ):
            raise ValueError(
                "some layers are of sliding_attention, but `sliding_window` is null; give a number, or name each layer "
                "full_attention in `layer_types`"
            )


class TwoRopes(Config, kw_only=True):
    """Base of architectures in which the layers with a window have a rotary embedding of their own.

    Derived classes have its fields, because a struct can have only one base with more fields than its other ones.
    """

    if TYPE_CHECKING:
        rope_local_base_freq: float
        rope_local_scaling: dict[str, Any] | None

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary embedding of a layer."""
        if self.kind(layer) == "full_attention":
            return self.rope
        return local_rope(self, self.rope_local_base_freq, self.rope_local_scaling)

    @property
    def max_positions(self) -> int:
        """Maximum length of a sequence in tokens, which config.json states with the scaling applied."""
        return self.rope.table.max_position


def local_rope(config: Config, theta: float, scaling: dict[str, Any] | None) -> Rope:
    """Return the rotary embedding of layers with a window, in an architecture where they have one of their own."""
    return Rope(config.head_size, theta, config.rope.table.max_position, scaling)


def every(period: int, layer: int) -> Kind:
    """Return the kind of a layer if the last of every `period` layers has no window."""
    return "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
