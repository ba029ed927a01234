"""Gemma 3n: four residual streams of which one is computed (AltUp), sparse gates, layers that share a cache."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist
from typing import Any, Literal

from tokenmill.layers.linear import Linear
from tokenmill.layers.mlp import GatedMlp, scaled
from tokenmill.layers.scope import Scope
from tokenmill.layers.streams import AltUp
from tokenmill.models import _gemma, _windows, llama
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import Size
from tokenmill.program import ops, special
from tokenmill.program.value import Inputs, Value

_LEAST = sqrt(1e-5)  # magnitude of a stream before it is scaled


class Config(_gemma.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Gemma3nTextConfig."""

    vocab_size: Size = 262400
    hidden_size: Size = 2048
    intermediate_size: Size | list[Size] = 16384  # type: ignore[assignment]
    num_hidden_layers: llama.Layers = 35
    num_key_value_heads: Size | None = 2
    max_position_embeddings: Length | None = 32768
    final_logit_softcapping: _gemma.Cap | None = 30.0
    num_kv_shared_layers: _gemma.Natural = 15
    altup_active_idx: Literal[0] = 0
    altup_correct_scale: bool = True
    altup_num_inputs: Count = 4
    laurel_rank: Size = 64
    activation_sparsity_pattern: float | list[float] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        for name in ("intermediate_size", "activation_sparsity_pattern"):
            given = getattr(self, name)
            if isinstance(given, list) and len(given) != self.num_hidden_layers:
                raise ValueError(f"`{name}` has {len(given)} numbers for {self.num_hidden_layers} layers")
        if not all(0 <= self.sparsity(layer) < 1 for layer in range(self.num_hidden_layers)):
            raise ValueError("`activation_sparsity_pattern` has a number that is not from 0 to 1")

    def default_kind(self, layer: int) -> _windows.Kind:
        """Return that the last of every five layers has no window."""
        return _windows.every(5, layer)

    def inner(self, layer: int) -> int:
        """Return the columns within the feed-forward layer of a layer."""
        return self.intermediate_size[layer] if isinstance(self.intermediate_size, list) else self.intermediate_size

    def sparsity(self, layer: int) -> float:
        """Return the share of a layer's gates that are zero; 0: no gate is."""
        pattern = self.activation_sparsity_pattern
        if pattern is None:
            return 0.95 if layer < 10 < self.num_hidden_layers else 0.0
        return pattern[layer] if isinstance(pattern, list) else pattern


class SparseMlp(GatedMlp):
    """Gated feed-forward layer in which only the largest gates are not zero."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        super().__init__(scope, c.hidden_size, c.inner(layer), c.act)
        sparsity = c.sparsity(layer)
        self.deviations = NormalDist().inv_cdf(sparsity) if sparsity else None

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (rows, width); the result has the same shape."""
        if self.deviations is None:
            return super().__call__(x)
        gate, up = self.gate_up(x)
        gate = gate.record(special.Sparsify, x=gate, deviations=self.deviations)
        return self.down(gate.record(ops.GatedAct, gate=gate, up=up, act=self.act))


class Layer:
    """Decoder layer of the first stream: attention beside a product of low rank, feed-forward layer, own input."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        self.before1, self.after1, self.before2, self.after2 = (
            c.norm(scope / f"{name}_layernorm", c.hidden_size) for name in names
        )
        laurel = scope / "laurel"
        self.left = Linear(laurel, c.hidden_size, "linear_left", c.laurel_rank)
        self.right = Linear(laurel, c.laurel_rank, "linear_right", c.hidden_size)
        self.laurel_norm = c.norm(laurel / "post_laurel_norm", c.hidden_size)
        self.attn = _gemma.Attention(c, scope / "self_attn", layer)
        self.mlp = SparseMlp(c, scope / "mlp", layer)
        self.hidden, self.own = c.hidden_size, _gemma.LayerInput(c, scope)
        self.altup = AltUp(
            scope / "altup", self.hidden, c.altup_num_inputs, c.rms_norm_eps, scaled=c.altup_correct_scale
        )

    def first(self, x: Value) -> Value:
        """Return the first stream."""
        return x.split(self.hidden)[0]

    def __call__(self, x: Value, own: Value) -> Value:
        """Apply the layer to x, (tokens, streams · hidden), and its own input; the result has the shape of x."""
        predicted = self.altup.predict(x, self.first(x))
        active = self.first(predicted)
        normed = self.before1(active)
        laurel = normed + self.laurel_norm(self.right(self.left(normed)))
        y = scaled(active + self.after1(self.attn(normed)) + laurel, 0.5**0.5)
        y = y + self.after2(self.mlp(self.before2(y)))
        x = self.altup.correct(predicted, y)
        return x.record(special.AddToOthers, x=x, y=self.own(self.altup.output(self.first(x)), own))


class Model(llama.Model):
    """Llama's model, with several streams between the embedding and the output layer."""

    layer: Any = Layer

    def __init__(self, c: Config, scope: Scope) -> None:
        super().__init__(c, scope)
        body, hidden = scope / "model", c.hidden_size
        self.inputs = _gemma.LayerInputs(c, body)
        self.widen, self.narrow = (
            [Linear(body, hidden, f"altup_{name}.{i}", hidden) for i in range(c.altup_num_inputs - 1)]
            for name in ("projections", "unembed_projections")
        )
        _gemma.share(c, self.layers)

    def run(self, inputs: Inputs, x: Value) -> Value:
        """Apply the layers, and return the mean of the streams, all of the magnitude of the first."""
        first, hidden = x, x.width
        for project in self.widen:
            made = project(first)
            made = made.record(special.WithMagnitude, x=made, like=first, least=_LEAST)
            x = x.record(special.Beside, x.width + hidden, x=x, y=made)
        layers: Any = self.layers
        for layer, own in zip(layers, self.inputs(inputs, first), strict=True):
            x = layer(x, own)
        first, *others = x.split(*[hidden] * (len(self.narrow) + 1))
        total = first
        for project, stream in zip(self.narrow, others, strict=True):
            made = project(stream)
            total = total + made.record(special.WithMagnitude, x=made, like=first, least=_LEAST)
        return scaled(total, 1 / (len(others) + 1))
