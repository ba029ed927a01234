"""Sums and listings that kinds of backends share: bytes and dtype of weights, kernels line by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tokenmill.program.cost import weights_of
from tokenmill.program.value import Program
from tokenmill.quant.base import check, stored_names
from tokenmill.weights.checkpoint import Checkpoint

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by dtype of a computation."""
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def stored_dtype(named: str | None, source: Checkpoint) -> str:
    """Return the dtype that config.json names, else that of the first tensor of floats."""
    if named is not None:
        return named
    kinds = (source[name].kind for name in source.names())
    return next((_FLOATS[kind] for kind in kinds if kind in _FLOATS), "bfloat16")


def stored_bytes(program: Program, source: Checkpoint) -> int:
    """Return the bytes of a program's weights as the checkpoint stores them; ModelError as `quant.base.check`."""
    weights = weights_of(program)
    check(weights, source)
    return sum(map(source.nbytes, stored_names(weights, source)))


def dense_bytes(program: Program, source: Checkpoint, dtype: str) -> int:
    """Return the bytes of a program's weights in a computation's dtype; ModelError as `quant.base.check`."""
    weights = weights_of(program)
    check(weights, source)
    return sum(weight.size for weight in weights) * ITEM_BYTES[dtype]


def listed(kernels: Mapping[str, Counter[str]], more: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return a line for each kind of operation with its kernels, and for each rule in `more`."""
    lines = {kind: _times(names) for kind, names in kernels.items()} | dict(more or {})
    width = max(map(len, lines), default=0)
    return tuple(f"{name.ljust(width)}  {text}" for name, text in lines.items())


def _times(kernels: Counter[str]) -> str:
    return ", ".join(f"{name} × {count}" if count > 1 else name for name, count in kernels.items())
