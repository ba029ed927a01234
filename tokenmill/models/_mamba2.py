"""Fields of architectures that mix Mamba 2 with attention, and a layer of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tokenmill.layers.mamba2 import Mamba2, Sizes
from tokenmill.layers.scope import Scope
from tokenmill.models import llama, mamba2
from tokenmill.models.llama import Apply, Size
from tokenmill.models.mamba import Factor, Kernel

KINDS = {"attention": "full_attention", "mamba": "linear_attention", "mamba2": "linear_attention"}
"""Kind of a layer in older versions of transformers -> its name now"""


class Hybrid(llama.Config, kw_only=True):
    """Llama's fields, and those of a mixer of Mamba 2, with the defaults that most architectures have."""

    num_key_value_heads: Size | None = 8
    mamba_n_heads: Size = 128
    mamba_d_head: Size | Literal["auto"] = "auto"
    mamba_n_groups: Size = 1
    mamba_d_state: Size = 256
    mamba_d_conv: Kernel = 4
    mamba_expand: Factor = 2
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_limit: tuple[Any, Any] | None = (0.0, float("inf"))

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for layers of an unknown kind."""
        super().__post_init__()
        if self.inner % self.mamba_n_heads or self.sizes.inner != self.inner:
            raise ValueError(
                f"{self.mamba_n_heads} heads of {self.mamba_d_head} columns are not {self.inner}, `mamba_expand` times "
                "`hidden_size`"
            )
        if self.mamba_n_heads % self.mamba_n_groups:
            raise ValueError(f"{self.mamba_n_groups} groups do not divide {self.mamba_n_heads} heads")
        if len(self.kinds) != self.num_hidden_layers or not set(self.kinds) <= set(KINDS.values()):
            raise ValueError(
                f"`layer_types` is {self.kinds}; expected {self.num_hidden_layers} of {', '.join(set(KINDS.values()))}"
            )

    @property
    def kinds(self) -> Sequence[str]:
        """Kind of each layer."""
        raise NotImplementedError

    @property
    def inner(self) -> int:
        """Number of columns of the scan."""
        return int(self.mamba_expand * self.hidden_size)

    @property
    def sizes(self) -> Sizes:
        """Return the sizes of a mixer."""
        low, high = map(mamba2.number, self.time_step_limit or (0.0, float("inf")))
        head = self.inner // self.mamba_n_heads if self.mamba_d_head == "auto" else self.mamba_d_head
        return Sizes(
            self.hidden_size, self.mamba_n_heads, head, self.mamba_d_state, self.mamba_n_groups, self.mamba_d_conv,
            self.rms_norm_eps, self.act, self.mamba_proj_bias, self.mamba_conv_bias, (low, high), self.mamba_n_groups,
        )  # fmt: skip


class Layer(llama.Layer):
    """Llama's decoder layer, with a mixer of Mamba 2 or attention."""

    second_norm = "pre_ff_layernorm"

    def mixer(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return Mamba 2 or attention."""
        if c.kinds[layer] == "full_attention":
            return super().mixer(c, scope, layer)
        return Mamba2(c.sizes, scope / "mamba", layer)
