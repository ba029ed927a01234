"""Estimate the bytes and FLOPs of a step from the program alone, without weights or a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tokenmill.program import encoded, foreign, ops
from tokenmill.program.keeps import CacheSpec, StateSpec
from tokenmill.program.ops import Op, Weight
from tokenmill.program.value import Program


@dataclass(frozen=True, slots=True)
class Load:
    """Size of a step: tokens, rows and context."""

    tokens: int
    samples: int
    context: int  # cache entries read, summed over sequences, including those that this step writes
    pairs: int  # (query, key) pairs
    inputs: int | None = None  # tokens that an encoder computes; None: all

    def within(self, window: int) -> tuple[float, float]:
        """Return `context` and `pairs` of a layer with a window, as if all sequences had the mean sizes.

        `window`: in tokens; 0: none.
        """
        if not window or not self.tokens:
            return self.context, self.pairs
        rows = max(self.samples, 1)
        count, context = self.tokens / rows, self.context / rows
        first = context - count
        unfilled = min(max(window - first, 0), count)  # queries that attend to all tokens before them
        pairs = unfilled * first + unfilled * (unfilled + 1) / 2 + (count - unfilled) * window
        return rows * min(context, window + count - 1), rows * pairs

    @staticmethod
    def decode(rows: int, context: int) -> Load:
        """Return the load of one token for each of `rows` sequences of `context` tokens, the new one included."""
        return Load(rows, rows, rows * context, rows * context, inputs=0)

    @staticmethod
    def prefill(tokens: int) -> Load:
        """Return the load of a whole prompt of `tokens` tokens."""
        return Load(tokens, 1, tokens, tokens * (tokens + 1) // 2)


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes moved, and floating-point operations."""

    weights: float = 0.0
    cache: float = 0.0
    activations: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weights + other.weights,
            self.cache + other.cache,
            self.activations + other.activations,
            self.flops + other.flops,
        )


_STATE_BYTES = 4

Bits = Callable[[Weight], float]
"""Weight -> bits per stored element, scales included."""


def cost(op: Op, load: Load, bits: Bits, cache_bytes: int = 2, activation_bytes: int = 2) -> Cost:
    """Return the cost of one operation.

    A state is counted as read and written once for each row that samples.
    """
    inputs = load.tokens if load.inputs is None else load.inputs
    rows = {"tokens": load.tokens, "samples": load.samples, "inputs": inputs}
    values = (*op.reads().values(), *op.results().values())
    moved = sum(v.width * rows[v.spec.rows] for v in values) * activation_bytes
    n = rows[op.out.spec.rows]
    if load.inputs == 0 and op.out.spec.rows == "inputs":
        return Cost()

    def size(w: Weight) -> float:
        return w.size * bits(w) / 8

    if isinstance(op, ops.Embed):
        return Cost(n * op.table.columns * bits(op.table) / 8, 0, moved)
    if isinstance(op, ops.Linear):
        return Cost(size(op.weight) + (size(op.bias) if op.bias else 0), 0, moved, 2 * n * op.weight.size)
    if isinstance(op, ops.Attention | encoded.DecoderAttention | foreign.TransformersAttention):
        return _attention(op, load, cache_bytes, moved)
    if isinstance(op, foreign.TransformersBody | foreign.TransformersHead):
        return Cost(op.parameters * activation_bytes, 0, moved, 2 * n * op.parameters)
    if isinstance(op, ops.LatentAttention):
        kept, heads = op.keeps().width, op.q.width // op.head_dim
        products = 2 * n * op.expand.size + 2 * heads * (kept + op.latent.width) * load.pairs
        return Cost(size(op.expand), kept * cache_bytes * (load.context + load.tokens), moved, products)
    if isinstance(op, ops.Experts):
        k, e = op.ids.width, len(op.down)
        touched = e * (1 - (1 - k / e) ** n)  # expected number, if every row chose at random
        each = sum(size(ws[0]) for ws in op.weights().values())
        return Cost(touched * each, 0, moved, 2 * n * k * (op.gate_up[0].size + op.down[0].size))
    if isinstance(op, ops.Route):
        return Cost(sum(size(w) for ws in op.weights().values() for w in ws), 0, moved, 2 * n * op.weight.size)
    weights = sum(size(w) for ws in op.weights().values() for w in ws)
    if (spec := op.state()) is not None:
        elements = math.prod(spec.shape)
        return Cost(weights, 2 * elements * load.samples * _STATE_BYTES, moved, 6 * elements * n)
    return Cost(weights, 0, moved, n * op.out.width)


def _attention(
    op: ops.Attention | encoded.DecoderAttention | foreign.TransformersAttention,
    load: Load,
    cache_bytes: int,
    moved: int,
) -> Cost:
    cache = op.keeps()
    if isinstance(op, ops.Attention):
        context, pairs = load.within(cache.window)
        return Cost(0, cache.width * cache_bytes * (context + load.tokens), moved, 4 * op.q.width * pairs)
    nbytes = cache.width * cache_bytes * (load.context + load.tokens)
    if isinstance(op, encoded.DecoderAttention):  # with the attention to the input in the same cache
        return Cost(0, nbytes, moved)
    return Cost(0, nbytes, 0, 4 * op.heads * op.head_dim * load.pairs)


def total(
    program: Program, load: Load, bits: Bits = lambda w: 16, *, cache_bytes: int = 2, activation_bytes: int = 2
) -> Cost:
    """Return the cost of a whole step."""
    return sum((cost(op, load, bits, cache_bytes, activation_bytes) for op in program.ops), Cost())


def cache_layout(program: Program) -> dict[int, CacheSpec]:
    """Return the cache to allocate for each layer."""
    found: dict[int, CacheSpec] = {}
    for op in program.ops:
        if (spec := op.keeps()) is not None:
            assert found.setdefault(spec.layer, spec) == spec, "two operations keep different caches of a layer"
    return found


def state_layout(program: Program) -> dict[tuple[int, str], StateSpec]:
    """Return the states to keep for each sequence, by layer and name."""
    found: dict[tuple[int, str], StateSpec] = {}
    for op in program.ops:
        if (spec := op.state()) is not None:
            assert spec.key not in found, "two operations keep the same state"
            found[spec.key] = spec
    return found


def weights_of(program: Program) -> list[Weight]:
    """Return the weights that the program names, each once, in the order of first use."""
    return list(dict.fromkeys(w for op in program.ops for ws in op.weights().values() for w in ws))
