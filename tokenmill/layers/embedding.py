"""Embedding tables, looked up by token id or position."""

from __future__ import annotations

from tokenmill.layers.scope import Scope
from tokenmill.program import ops
from tokenmill.program.ops import Part, Shard, Weight
from tokenmill.program.value import Value


class Embedding:
    """Embedding table: ids (tokens, 1) -> (tokens, width). `offset`: stored rows before that of id 0."""

    def __init__(
        self, scope: Scope, rows: int, width: int, *, shard: Shard = "vocab", scale: float = 1.0, offset: int = 0
    ) -> None:
        self.weight = Weight((Part(scope / "weight", rows, offset),), width, shard, table=True)
        self.scale = scale

    def __call__(self, ids: Value) -> Value:
        """Look up the rows of `ids`."""
        return ids.record(ops.Embed, self.weight.columns, ids=ids, table=self.weight, scale=self.scale)
