"""Mamba: layers of a selective scan behind a short convolution, without attention."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Protocol

import msgspec

from tokenmill.layers.embedding import Embedding
from tokenmill.layers.linear import Linear, Linears, head
from tokenmill.layers.mlp import act, take_rows
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.recurrence import CausalConv
from tokenmill.layers.scope import Scope
from tokenmill.models import base, llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Size
from tokenmill.program import ops
from tokenmill.program.ops import Part, Weight
from tokenmill.program.recurrence import StateSpace
from tokenmill.program.value import Inputs, Value

LENGTH = 1 << 15
"""Maximum length of a sequence by default, of models that have none of their own."""
Kernel = Annotated[int, msgspec.Meta(ge=2, le=1 << 8)]
Factor = Annotated[float, msgspec.Meta(gt=0, le=64)]


class Widths:
    """Methods of the configurations of Mamba and its hybrids: the widths of a layer."""

    hidden_size: Size  # the types of derived classes' fields, which these would replace
    expand: Factor
    time_step_rank: Size | Literal["auto"]

    @property
    def inner(self) -> int:
        """Number of columns of the scan."""
        return int(self.expand * self.hidden_size)

    @property
    def rank(self) -> int:
        """Number of columns from which the steps are projected."""
        return math.ceil(self.hidden_size / 16) if self.time_step_rank == "auto" else self.time_step_rank


class Config(Widths, base.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' MambaConfig."""

    hidden_size: Size = 768
    state_size: Size = 16
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)] = 32
    vocab_size: Size = 50280
    max_position_embeddings: Length | None = LENGTH
    layer_norm_epsilon: float = 1e-5
    expand: Factor = 2
    conv_kernel: Kernel = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: llama.Act = "silu"
    time_step_rank: Size | Literal["auto"] = "auto"
    tie_word_embeddings: bool = True

    @property
    def max_positions(self) -> int:
        """Maximum length of a sequence in tokens."""
        return self.max_position_embeddings or LENGTH

    @property
    def act(self) -> str:
        """Activation of convolution and gate."""
        return llama.act_of(self.hidden_act)


class Sizes(Protocol):
    """Properties of a configuration that a mixer reads."""

    hidden_size: int
    state_size: int
    conv_kernel: int
    use_bias: bool
    use_conv_bias: bool

    @property
    def inner(self) -> int:
        """Number of columns of the scan."""

    @property
    def rank(self) -> int:
        """Number of columns from which the steps are projected."""

    @property
    def act(self) -> str:
        """Activation of convolution and gate."""


class Mixer:
    """Selective scan: projection, convolution, steps and coefficients from its result, scan, gate, projection."""

    def __init__(self, c: Sizes, scope: Scope, layer: int) -> None:
        n, rank = c.inner, c.rank
        self.x_gate = Linears(scope, c.hidden_size, shard="column", bias=c.use_bias, outputs={"in_proj": (n, n)})
        self.conv = CausalConv(scope / "conv1d", n, c.conv_kernel, layer=layer, bias=c.use_conv_bias, shard="column")
        self.coefficients = Linears(scope, n, shard="row", outputs={"x_proj": (rank, c.state_size, c.state_size)})
        self.steps = Linear(scope, rank, "dt_proj", n, shard="column", bias=True)
        self.a_log = Weight((Part(scope / "A_log", n),), c.state_size, "column")
        self.d = Weight((Part(scope / "D", n),), 0, "column")
        self.out = Linear(scope, n, "out_proj", c.hidden_size, shard="row", bias=c.use_bias)
        self.act, self.layer = c.act, layer

    def norm(self, dt: Value, b: Value, c: Value) -> tuple[Value, Value, Value]:
        """Normalize step, b and c. Returns them unchanged here; derived models override it."""
        return dt, b, c

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        x, gate = self.x_gate(x)
        x = act(self.conv(x), self.act)
        dt, b, c = self.norm(*self.coefficients(x))
        y = x.record(StateSpace, x=x, dt=self.steps(dt), b=b, c=c, a_log=self.a_log, d=self.d, layer=self.layer)
        return self.out(y.record(ops.GatedAct, gate=gate, up=y, act=self.act))


class Layer:
    """Decoder layer: norm, mixer and residual connection."""

    def __init__(self, c: Any, scope: Scope, layer: int) -> None:
        self.norm = RmsNorm(scope / "norm", c.hidden_size, c.layer_norm_epsilon)
        self.mix = self.mixer(c, scope / "mixer", layer)

    def mixer(self, c: Any, scope: Scope, layer: int) -> llama.Apply:
        """Return the mixer. Derived models with another one override it."""
        return Mixer(c, scope, layer)

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        return x + self.mix(self.norm(x))


class Model:
    """Complete model: from token ids to the logits of the rows that sample."""

    layer = Layer

    def __init__(self, c: Any, scope: Scope) -> None:
        body = scope / "backbone"
        self.embed = Embedding(body / "embeddings", c.vocab_size, c.hidden_size)
        self.layers = [self.layer(c, body / f"layers.{i}", i) for i in range(c.num_hidden_layers)]
        self.norm = RmsNorm(body / "norm_f", c.hidden_size, c.layer_norm_epsilon)
        self.head = head(scope, c.hidden_size, c.vocab_size, self.embed.weight if c.tie_word_embeddings else None)

    def __call__(self, inputs: Inputs) -> Value:
        """Record the model and return the logits of the rows that sample, (samples, vocabulary)."""
        x = self.embed(inputs.ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(take_rows(x)))
