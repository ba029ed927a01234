"""Read FP8 weights as Meta's fbgemm stores them: e4m3, with a scale for each output.

`activation_scale_ub` bounds the scales with which fbgemm quantizes activations. It changes numbers beyond 1200 only;
activations are not bounded here. Llama 4's experts are stacked and stored (inputs, outputs).
"""

from __future__ import annotations

import msgspec

from tokenmill.quant import _eight
from tokenmill.quant._method import Matrix
from tokenmill.quant._settings import misfits, settings
from tokenmill.quant.base import Piece
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint


class Settings(msgspec.Struct):
    """Fields of the checkpoint's description that are read."""

    activation_scale_ub: float = 1200.0


def matrix(source: Checkpoint, name: str) -> Matrix | None:
    """Return how a weight is stored; see `base`."""
    bound = settings(source, Settings).activation_scale_ub
    if not bound > 0:
        raise misfits(source, "activation_scale_ub", bound, ("a positive number",), "Copy config.json again.")
    return _eight.matrix(source, name, None, turned=_turned(name))


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece in FP8 with its scales."""
    return _eight.read(source, piece, None, turned=_turned(piece.name))


def _turned(name: str) -> bool:
    return not name.endswith(".weight")
