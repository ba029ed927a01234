"""Symbolic values, and the program that is recorded by calling a model on them.

Invariant: every value is a matrix with one row per token of the step ("tokens"), per sequence that samples ("samples")
or per token of an encoder's input ("inputs"), and a fixed width. A range of columns is a view, so splitting a fused
product copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tokenmill.program.ops import Op

Rows = Literal["tokens", "samples", "inputs"]
DType = Literal["float", "int8", "ids"]
"""float: the backend's compute type; int8: codes with one scale per 32 columns; ids: integers"""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Storage of a value. Invariant: ids are unique within a program."""

    id: int
    rows: Rows
    width: int
    dtype: DType = "float"


@dataclass(frozen=True, slots=True)
class Value:
    """Columns [start, start + width) of a buffer.

    `tape`: the list that operations on this value are appended to, for models only. Passes and backends ignore it.
    """

    spec: Buffer
    start: int
    width: int
    tape: Tape = field(repr=False, compare=False)

    @property
    def buffer(self) -> int:
        """Id of the buffer."""
        return self.spec.id

    @property
    def whole(self) -> bool:
        """True if the value covers its whole buffer."""
        return self.width == self.spec.width

    def split(self, *widths: int) -> list[Value]:
        """Return adjacent views of the given widths, from the left."""
        starts = [self.start + sum(widths[:i]) for i in range(len(widths))]
        return [replace(self, start=start, width=width) for start, width in zip(starts, widths, strict=True)]

    def record(self, kind: type[Op], width: int | None = None, rows: Rows | None = None, **fields: Any) -> Value:
        """Append an operation; by default its result has this value's rows and width. Return the result."""
        return self.tape.record(kind, rows or self.spec.rows, width or self.width, **fields)

    def __add__(self, other: Value) -> Value:
        from tokenmill.program.ops import Add  # here, because ops.py imports this file

        return self.record(Add, x=self, y=other)


class Tape:
    """List of operations under construction, by a model that is being recorded or by a pass."""

    def __init__(self, first_id: int = 0) -> None:
        self.ops: list[Op] = []
        self.next_id = first_id

    def new(self, rows: Rows, width: int, dtype: DType = "float") -> Value:
        """Return a new value that no operation writes yet."""
        self.next_id += 1
        return Value(Buffer(self.next_id - 1, rows, width, dtype), 0, width, self)

    def record(self, kind: type[Op], rows: Rows, width: int, **fields: Any) -> Value:
        """Append an operation and return its result."""
        self.ops.append(kind(out=self.new(rows, width), **fields))
        return self.ops[-1].out


@dataclass(frozen=True, slots=True)
class Inputs:
    """Symbolic inputs of a model. Attention and RoPE read positions and block tables from the step instead."""

    ids: Value
    positions: Value


@dataclass(frozen=True, slots=True)
class Program:
    """Model as a list of operations. Invariant: an operation follows those whose results it reads."""

    ops: tuple[Op, ...]
    inputs: Inputs
    outputs: dict[str, Value]  # by name; "logits": those of the rows that sample
    whole: Program | None = None  # the program of which this is a stage, not sharded; None: it is no stage

    @property
    def logits(self) -> Value:
        """Logits of the rows that sample, (samples, vocabulary)."""
        return self.outputs["logits"]

    @property
    def model(self) -> Program:
        """Program of the whole model: this one, unless it is a stage."""
        return self.whole or self

    @property
    def samples(self) -> bool:
        """True if it ends in logits; False for a stage before the last one."""
        return "logits" in self.outputs

    def tape(self) -> Tape:
        """Return an empty tape whose new buffer ids do not clash with this program's."""
        used = [v.buffer for op in self.ops for v in op.results().values()]
        return Tape(1 + max([*used, self.inputs.ids.buffer, self.inputs.positions.buffer]))

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops))


def record(model: Callable[[Inputs], Value]) -> Program:
    """Call `model` once on symbolic inputs and return the recorded program. Requires no weights."""
    tape = Tape()
    inputs = Inputs(tape.new("tokens", 1, "ids"), tape.new("tokens", 1, "ids"))
    logits = model(inputs)
    return Program(tuple(tape.ops), inputs, {"logits": logits})
