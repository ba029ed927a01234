"""Symbolic values, and the program that calling a model on them records.

Every value is a matrix: one row per token of the step ("tokens") or per row that samples ("samples"), a known width.
A range of columns is a view, so the parts of a fused product cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tokenmill.program.ops import Op

Rows = Literal["tokens", "samples"]
DType = Literal["float", "int8", "ids"]
"""float: what the backend computes in; int8: codes with a scale per 32 columns; ids: integers"""


@dataclass(frozen=True, slots=True)
class Buffer:
    """What a value lives in. Ids are unique within a program."""

    id: int
    rows: Rows
    width: int
    dtype: DType = "float"


@dataclass(frozen=True, slots=True)
class Value:
    """Columns [start, start + width) of a buffer.

    The tape is where a model goes on writing; passes and backends look away.
    """

    spec: Buffer
    start: int
    width: int
    tape: Tape = field(repr=False, compare=False)

    @property
    def buffer(self) -> int:
        """The buffer's id."""
        return self.spec.id

    @property
    def whole(self) -> bool:
        """True if it is all of its buffer."""
        return self.width == self.spec.width

    def split(self, *widths: int) -> list[Value]:
        """Views side by side, from the left."""
        starts = [self.start + sum(widths[:i]) for i in range(len(widths))]
        return [replace(self, start=start, width=width) for start, width in zip(starts, widths, strict=True)]

    def record(self, kind: type[Op], width: int | None = None, rows: Rows | None = None, **fields: Any) -> Value:
        """Append an operation whose result has this value's rows and width unless told."""
        return self.tape.record(kind, rows or self.spec.rows, width or self.width, **fields)

    def __add__(self, other: Value) -> Value:
        from tokenmill.program.ops import Add  # ops.py imports this file

        return self.record(Add, x=self, y=other)


class Tape:
    """Where a program is written: by a model once, by a pass for each list it makes."""

    def __init__(self, first_id: int = 0) -> None:
        self.ops: list[Op] = []
        self.next_id = first_id

    def new(self, rows: Rows, width: int, dtype: DType = "float") -> Value:
        """A value that nothing has written yet."""
        self.next_id += 1
        return Value(Buffer(self.next_id - 1, rows, width, dtype), 0, width, self)

    def record(self, kind: type[Op], rows: Rows, width: int, **fields: Any) -> Value:
        """Append an operation; its result."""
        self.ops.append(kind(out=self.new(rows, width), **fields))
        return self.ops[-1].out


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model is called on. Attention and rope read positions and block tables themselves."""

    ids: Value
    positions: Value


@dataclass(frozen=True, slots=True)
class Program:
    """A model as a list of operations, each after those whose results it reads."""

    ops: tuple[Op, ...]
    inputs: Inputs
    outputs: dict[str, Value]  # by name; "logits": of the rows that sample

    @property
    def logits(self) -> Value:
        """The output of the rows that sample, (samples, vocabulary)."""
        return self.outputs["logits"]

    def tape(self) -> Tape:
        """An empty one whose new values do not clash with this program's."""
        used = [v.buffer for op in self.ops for v in op.results().values()]
        return Tape(1 + max([*used, self.inputs.ids.buffer, self.inputs.positions.buffer]))

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops))


def record(model: Callable[[Inputs], Value]) -> Program:
    """Call `model` once on symbolic inputs; needs no weights, only what config.json says."""
    tape = Tape()
    inputs = Inputs(tape.new("tokens", 1, "ids"), tape.new("tokens", 1, "ids"))
    logits = model(inputs)
    return Program(tuple(tape.ops), inputs, {"logits": logits})
