"""Alternating updates (AltUp, arXiv:2301.13310): several residual streams, of which a layer computes one."""

from __future__ import annotations

from tokenmill.layers.linear import Linear
from tokenmill.layers.mlp import scaled as multiplied
from tokenmill.layers.mlp import soft_cap
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.scope import Scope
from tokenmill.program import special
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Value


class AltUp:
    """Prediction of all streams from all, and their correction by what the layer made of the first.

    `scaled`: the corrected first stream is multiplied by a trained number for each column before it is read.
    """

    def __init__(self, scope: Scope, hidden: int, streams: int, eps: float, *, scaled: bool) -> None:
        self.norm = RmsNorm(scope / "router_norm", hidden, eps)
        self.router = Linear(scope, hidden, "modality_router", streams)
        self.prediction = Linear(scope, streams, "prediction_coefs", streams**2)
        self.correction = Linear(scope, streams, "correction_coefs", streams)
        self.scale = Weight((Part(scope / "correct_output_scale", hidden),)) if scaled else None
        self.factor = 1 / hidden

    def routed(self, x: Value) -> Value:
        """Return a number for each stream."""
        return soft_cap(self.router(multiplied(self.norm(x), self.factor)), 1.0)

    def predict(self, x: Value, first: Value) -> Value:
        """Return the predictions for all streams."""
        return x.record(special.MixStreams, x=x, factors=self.prediction(self.routed(first)))

    def correct(self, predicted: Value, made: Value) -> Value:
        """Return the corrected streams."""
        factors = self.correction(self.routed(made))
        return predicted.record(special.CorrectStreams, x=predicted, y=made, factors=factors)

    def output(self, x: Value) -> Value:
        """Return the corrected first stream as input of what follows."""
        return x if self.scale is None else x.record(special.ScaleByWeight, x=x, weight=self.scale)
