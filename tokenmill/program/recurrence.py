"""Operations that keep a state of fixed size per sequence, instead of a cache that grows with it.

A row of a step continues from the state that its sequence had before the row's first token. At position 0 the state is
zero, so a sequence that is computed again from its beginning needs no other reset.
"""

from __future__ import annotations

from typing import ClassVar

from tokenmill.program.keeps import StateSpec
from tokenmill.program.ops import Op, Weight
from tokenmill.program.value import Value


class CausalConv(Op):
    """Convolve each column over the last tokens of its sequence: out[t] = Σ weight[k] · x[t - kernel + 1 + k] + bias.

    `weight`: (columns, kernel). The state is the last kernel - 1 inputs. `name`: unique within a layer. `act`: applied
    to the result, if set by fusion.
    """

    rowwise: ClassVar[bool] = False
    x: Value
    weight: Weight
    bias: Weight | None = None
    layer: int
    name: str = "conv"
    act: str | None = None

    def state(self) -> StateSpec:
        """Return the spec of the last inputs."""
        return StateSpec(self.layer, self.name, (self.weight.columns - 1, self.x.width), "float")


class StateSpace(Op):
    """Scan with input-dependent coefficients: the recurrence of Mamba and Mamba 2.

    For each head, with step = softplus(dt + dt_bias) clamped to `limits` and decay = exp(-step · exp(a_log)):
    state = decay · state + step · x ⊗ b, and out = state · c + d · x. `a_log`: one number for each head, or one for
    each head and column of the state. `dt` has a number for each head; adjacent heads share one of the `groups` of b
    and c. Mamba is the case of heads of a single column.
    """

    rowwise: ClassVar[bool] = False
    x: Value
    dt: Value
    b: Value
    c: Value
    a_log: Weight
    d: Weight
    dt_bias: Weight | None = None
    groups: int = 1
    limits: tuple[float, float] = (0.0, float("inf"))
    layer: int

    def state(self) -> StateSpec:
        """Return the spec of (heads, columns of a head, columns of the state)."""
        heads = self.dt.width
        return StateSpec(self.layer, "scan", (heads, self.x.width // heads, self.b.width // self.groups), "float32")


class DeltaRule(Op):
    """Keep a matrix for each head, and correct what it returns for a key: the gated delta rule.

    For each head: state = decay · state, then state += k ⊗ (rate · (v - k · state)), and out = q · state. Queries and
    keys are divided by their lengths, and queries by the root of `head_dim`, the columns of a key. Adjacent heads of v
    share a head of q and k. decay = exp(-exp(a_log) · softplus(a + dt_bias)) for each head, or for each of its rows of
    the state if `a` has as many columns; rate = `rate` · sigmoid(b).
    """

    rowwise: ClassVar[bool] = False
    v: Value
    q: Value
    k: Value
    a: Value
    b: Value
    a_log: Weight
    dt_bias: Weight
    head_dim: int
    rate: float = 1.0
    layer: int

    def state(self) -> StateSpec:
        """Return the spec of (heads, columns of a key, columns of a value)."""
        heads = self.b.width
        return StateSpec(self.layer, "delta", (heads, self.head_dim, self.v.width // heads), "float32")


class RgLru(Op):
    """Real-gated linear recurrent unit: the recurrence of Griffin, a number for each column.

    gate = sigmoid(x · matrixᵀ + bias), with a matrix for each head and a row of the bias for each head. With
    log decay = -8 · softplus(a) · recurrence gate: state = decay · state + √(1 - decay²) · input gate · x = out. At
    position 0 the root is 1.
    """

    rowwise: ClassVar[bool] = False
    x: Value
    input_gate: tuple[Weight, ...]
    input_bias: Weight
    recurrence_gate: tuple[Weight, ...]
    recurrence_bias: Weight
    a: Weight
    layer: int

    def state(self) -> StateSpec:
        """Return the spec of the last results."""
        return StateSpec(self.layer, "lru", (self.x.width,), "float32")
