"""Operations of an encoder and a decoder in one program.

A prompt is the encoder's input, and one token that begins the answer. The encoder's operations have values with rows
"inputs": the tokens of one sequence's input, all at once. They run once, when the last token of the input is computed.
Both kinds of attention of a decoder layer share its cache: at the positions of the input it holds keys and values for
cross-attention, at later positions those of the decoder's own tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.program.keeps import CachePart, CacheSpec
from tokenmill.program.ops import Op, Weight
from tokenmill.program.value import Program, Tape, Value


class RelativeBias(NamedTuple):
    """Bias of scores by the distance of two tokens: a number for each head and each bucket of distances (T5).

    Half of a side's buckets are single distances; the others grow to `longest` and beyond.
    """

    weight: Weight  # (buckets, heads)
    longest: int


class InputIds(Op):
    """Return the ids of the encoder's tokens."""

    rowwise = False


class EncoderAttention(Op):
    """Attend to all tokens of the input, before and after."""

    rowwise = False
    q: Value
    k: Value
    v: Value
    head_dim: int
    scale: float
    bias: Weight
    longest: int  # as in `RelativeBias`


class StoreInput(Op):
    """Write the keys and values of the encoder's result to the cache of a decoder layer, and return the keys."""

    rowwise = False
    k: Value
    v: Value
    layer: int


class DecoderAttention(Op):
    """Write k and v to the cache of `layer`, then attend to the decoder's tokens so far."""

    rowwise = False
    q: Value
    k: Value
    v: Value
    layer: int
    head_dim: int
    scale: float
    bias: Weight
    longest: int  # as in `RelativeBias`

    def keeps(self) -> CacheSpec:
        """Return the spec of one key and one value per head, of an input's token or of a decoder's."""
        heads = self.k.width // self.head_dim
        return CacheSpec(self.layer, (CachePart("key", heads, self.head_dim), CachePart("value", heads, self.head_dim)))


class CrossAttention(Op):
    """Attend to all tokens of the input, in the cache of `layer`."""

    rowwise = False
    q: Value
    layer: int
    head_dim: int
    scale: float


def buckets_of(distance: NDArray[np.integer], count: int, longest: int, *, both_sides: bool) -> NDArray[np.int64]:
    """Return the bucket of each distance, the position of a key minus that of a query (arXiv:1910.10683).

    A side has a bucket for each of its first distances, then buckets whose width grows by a constant factor up to
    `longest`. `both_sides`: half of the `count` buckets are for keys behind the query; else those count as distance 0.
    """
    side = count // 2 if both_sides else count
    far = np.abs(distance) if both_sides else np.maximum(-distance, 0)
    single = side // 2
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(single)) / np.float32(np.log(longest / single))
    growth = single + (ratio * np.float32(side - single)).astype(np.int64)
    bucket = np.where(far < single, far, np.minimum(growth, side - 1))
    return np.asarray(bucket + side * (distance > 0) if both_sides else bucket, np.int64)


def input_ids(tape: Tape) -> Value:
    """Record the ids of the encoder's tokens."""
    tape.ops.append(InputIds(out=tape.new("inputs", 1, "ids")))
    return tape.ops[-1].out


def encodes(program: Program) -> bool:
    """Return True if the program has an encoder, so that a prompt is not the beginning of the answer's sequence."""
    return any(isinstance(op, InputIds) for op in program.ops)
