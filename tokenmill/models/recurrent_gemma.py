"""RecurrentGemma: Griffin's recurrent unit behind a short convolution, and local attention in some layers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from tokenmill.layers.linear import Linear, Linears
from tokenmill.layers.mlp import GatedMlp, act, times
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.recurrence import CausalConv
from tokenmill.layers.scope import Scope
from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, Biases, Size
from tokenmill.models.mamba import LENGTH, Kernel
from tokenmill.program.ops import Part, Weight
from tokenmill.program.recurrence import RgLru
from tokenmill.program.value import Value


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' RecurrentGemmaConfig."""

    rotates_whole_heads: ClassVar[bool] = False

    num_hidden_layers: llama.Layers = 26
    vocab_size: Size = 256000
    hidden_size: Size = 2560
    intermediate_size: Size = 7680
    num_attention_heads: Size = 10
    max_position_embeddings: Length | None = LENGTH
    partial_rotary_factor: float = 0.5
    lru_width: Size | None = None  # None: hidden_size
    attention_window_size: Size = 2048
    conv1d_width: Kernel = 4
    logits_soft_cap: float = 30.0
    hidden_activation: llama.Act = "gelu_pytorch_tanh"
    block_types: tuple[Literal["recurrent", "attention"], ...] = ("recurrent", "recurrent", "attention")
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        if self.width % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide `lru_width` {self.width}")
        if not self.block_types:
            raise ValueError("`block_types` is empty")

    @property
    def width(self) -> int:
        """Number of columns of the recurrent unit."""
        return self.lru_width or self.hidden_size

    @property
    def act(self) -> str:
        """Activation of the feed-forward layer and of the gate."""
        return llama.act_of(self.hidden_activation)

    @property
    def biases(self) -> Biases:
        """Return the biases: those of attention's inputs as config.json sets them, all others."""
        return Biases(self.attention_bias, True, True)

    def norm(self, scope: Scope, width: int, *, per_head: bool = False) -> RmsNorm:
        """Return a norm, whose weight is stored minus one."""
        return RmsNorm(scope, width, self.rms_norm_eps, per_head=per_head, add=1.0)

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens."""
        return self.attention_window_size

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings: a root, rounded to bfloat16."""
        bits = int(np.float32(self.hidden_size**0.5).view(np.uint32))
        rounded = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
        return float(np.uint32(rounded).view(np.float32))

    @property
    def logit_cap(self) -> float:
        """Soft cap of the logits."""
        return self.logits_soft_cap


class Recurrent:
    """Recurrent block: a gate beside a convolution and a recurrent unit."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        n, heads = c.width, c.num_attention_heads
        self.inputs = Linears(scope, c.hidden_size, bias=True, outputs={"linear_y": n, "linear_x": n})
        self.conv = CausalConv(scope / "conv_1d", n, c.conv1d_width, layer=layer, bias=True)
        unit, size = scope / "rg_lru", n // heads

        def gate(name: str) -> tuple[Weight, ...]:
            parts = [Part(unit / f"{name}_weight", size, index=i) for i in range(heads)]
            return tuple(Weight((part,), size, transposed=True) for part in parts)

        def bias(name: str) -> Weight:
            return Weight((Part(unit / f"{name}_bias", heads),), size)

        self.unit = {
            "input_gate": gate("input_gate"), "input_bias": bias("input_gate"),
            "recurrence_gate": gate("recurrent_gate"), "recurrence_bias": bias("recurrent_gate"),
            "a": Weight((Part(unit / "recurrent_param", n),)), "layer": layer,
        }  # fmt: skip
        self.out, self.act = Linear(scope, n, "linear_out", c.hidden_size, bias=True), c.act

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        y, x = self.inputs(x)
        x = self.conv(x)
        fields: dict[str, Any] = self.unit
        return self.out(times(act(y, self.act), x.record(RgLru, x=x, **fields)))


class Layer(llama.Layer):
    """Llama's decoder layer, with a recurrent block or local attention."""

    first_norm, second_norm = "temporal_pre_norm", "channel_pre_norm"

    def mixer(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the recurrent block or attention."""
        kind = llama.Attention if c.block_types[layer % len(c.block_types)] == "attention" else Recurrent
        mixer: Apply = kind(c, scope / "temporal_block", layer)
        return mixer

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer, of half the width that config.json states."""
        return GatedMlp(scope / "mlp_block", c.hidden_size, c.intermediate_size // 2, c.act, bias=True)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer

    def __init__(self, c: Config, scope: Scope) -> None:
        super().__init__(c, scope)
        self.norm = c.norm(scope / "model.final_norm", c.hidden_size)
