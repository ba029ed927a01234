"""Qwen 3.5: Qwen 3 Next without experts, with the projections of the delta rule stored one by one."""

from __future__ import annotations

from tokenmill.layers.linear import Linears
from tokenmill.layers.scope import Scope
from tokenmill.models import llama, qwen3_next
from tokenmill.models.llama import Size


class Config(qwen3_next.Hybrid, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Qwen3_5TextConfig."""

    vocab_size: Size = 248320
    intermediate_size: Size = 12288
    num_key_value_heads: Size | None = 4


class DeltaNet(qwen3_next.DeltaNet):
    """Qwen 3 Next's delta rule, with its projections under other names."""

    def project(self, c: qwen3_next.Hybrid, scope: Scope, heads: int) -> None:
        """Make the projection to columns that are convolved, gate, rates and decays."""
        outputs = {
            "in_proj_qkv": 2 * self.keys + self.values,
            "in_proj_z": self.values,
            "in_proj_b": heads,
            "in_proj_a": heads,
        }
        self.inputs = Linears(scope, c.hidden_size, outputs=outputs)


class Layer(qwen3_next.Mixed):
    """Qwen 3 Next's decoder layer, with this file's delta rule and without experts."""

    delta = DeltaNet


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
