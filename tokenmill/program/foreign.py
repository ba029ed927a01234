"""Operations of a model that transformers computes, with the attention and the cache of this package.

Such a program has one operation for each call of attention, in the order of the calls, which declares the cache; then
the body, which makes these calls; then the head. Only `backends/transformers` has kernels for them.
"""

from __future__ import annotations

from tokenmill.program.keeps import CachePart, CacheSpec
from tokenmill.program.ops import Op
from tokenmill.program.value import Program, Value


class TransformersAttention(Op):
    """Declare a call of causal attention that `TransformersBody` makes. The result is not used."""

    rowwise = False
    ids: Value
    layer: int  # number of the call
    heads: int
    kv_heads: int
    key_dim: int  # of a head, as its value_dim
    value_dim: int
    scale: float
    window: int = 0  # as in `ops.Attention`
    chunk: int = 0  # as in `ops.Attention`
    softcap: float = 0.0  # as in `ops.Attention`

    @property
    def head_dim(self) -> int:
        """Number of columns of a head in the cache, where keys and values are as wide as the wider of the two."""
        return max(self.key_dim, self.value_dim)

    def keeps(self) -> CacheSpec:
        """Return the spec of one key and one value per head."""
        parts = (CachePart("key", self.kv_heads, self.head_dim), CachePart("value", self.kv_heads, self.head_dim))
        return CacheSpec(self.layer, parts, self.window)


class TransformersBody(Op):
    """Compute all layers. The result are the head's inputs, or the logits of all tokens if there is no head."""

    rowwise = False
    ids: Value
    model_type: str
    parameters: int
    widest: int  # columns of the widest result of a layer inside
    code: str = ""  # folder whose Python files define the model; "": transformers does


class TransformersHead(Op):
    """Compute the logits, with everything that the model does to them."""

    x: Value
    parameters: int


def body_of(program: Program) -> TransformersBody | None:
    """Return the operation of a program that transformers computes; None if it is not such a program."""
    return next((op for op in program.ops if isinstance(op, TransformersBody)), None)
