"""Refuse EXL2 checkpoints, whose codes have several widths in one matrix, by name."""

from __future__ import annotations

from typing import NoReturn

from tokenmill.errors import Unsupported
from tokenmill.quant.base import Piece
from tokenmill.weights.checkpoint import Checkpoint

_KNOWN = ("awq", "compressed-tensors", "fp8", "gguf", "gptq")


def refuse() -> NoReturn:
    """Raise Unsupported with the nearest alternatives."""
    raise Unsupported(
        "quantization", "exl2", _KNOWN,
        "ExLlamaV2 alone reads its matrices of mixed widths. Serve a GPTQ or AWQ checkpoint of the model of 4 bits, or "
        "a GGUF file of about as many bits a weight (2.5: Q2_K, 3.5: Q3_K_M, 4.5: Q4_K_M, 6: Q6_K).",
    )  # fmt: skip


def matrix(source: Checkpoint, name: str) -> NoReturn:
    """Raise Unsupported."""
    refuse()


def read(source: Checkpoint, piece: Piece) -> NoReturn:
    """Raise Unsupported."""
    refuse()
