"""CodeGen: GPT-J with a fused matrix of queries, values and keys in four groups, as it was trained on four devices."""

from __future__ import annotations

from collections.abc import Mapping

from tokenmill.layers.linear import interleaved
from tokenmill.models import gptj
from tokenmill.models._gpt import Model
from tokenmill.program.ops import Part

__all__ = ["Config", "Model"]

_GROUPS = 4


class Config(gptj.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' CodeGenConfig."""

    names = gptj.Config.names._replace(qkv=("qkv_proj",))

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that are inconsistent."""
        super().__post_init__()
        if self.num_attention_heads % _GROUPS:
            raise ValueError(f"{self.num_attention_heads} heads cannot be in {_GROUPS} groups; give a multiple")

    @property
    def qkv(self) -> Mapping[str, int | tuple[int, ...] | tuple[Part, ...]]:
        """See `_gpt.Config`."""
        q, v, k = interleaved(_GROUPS, *[self.hidden_size // _GROUPS] * 3)
        return {self.names.qkv[0]: (q, k, v)}
