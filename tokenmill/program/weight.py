"""References to the tensors of a checkpoint that operations name, and which part of them a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenmill.program.share import Axis, Heads

Shard = Literal["none", "column", "row", "vocab", "part"]
"""What ranks share. column: outputs; row: inputs; vocab: outputs, then gathered (head) or summed (embedding); part: the
parts of the weight, of which each rank has some, such as those of experts"""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, start + rows) of the checkpoint's tensor `name`.

    `index`: the matrix or vector of a tensor that stacks several, such as the experts of a layer; None: not stacked.
    `below`: number of matrices that lie below each other in a tensor of two axes; 0: it has an axis for them.

    If `run` is set, the part is stored in runs of so many rows, of which one begins every `step` rows. That is how a
    matrix is stored that holds query, key and value of the first head, then those of the second, and so on.
    """

    name: str
    rows: int
    start: int = 0
    index: int | None = None
    run: int = 0
    step: int = 0
    below: int = 0

    @property
    def end(self) -> int:
        """Number of rows that the tensor has at least; of a part in runs, those of all other parts of its steps too."""
        return self.start + self.rows if not self.run else self.rows // self.run * self.step

    def slices(self, first: int, count: int) -> list[slice]:
        """Return the places in the tensor of the part's rows [first, first + count), in order."""
        if not self.run:
            return [slice(self.start + first, self.start + first + count)]
        if self.run == 1:
            at = self.start + first * self.step
            return [slice(at, at + (count - 1) * self.step + 1, self.step)]
        found = []
        while count:
            index, within = divmod(first, self.run)
            n, at = min(self.run - within, count), self.start + index * self.step + within
            found.append(slice(at, at + n))
            first, count = first + n, count - n
        return found


@dataclass(frozen=True, slots=True)
class Weight:
    """Reference to a matrix (rows, columns) or vector of the checkpoint, as parts stacked along the output dimension.

    It holds names and sizes only. `quant.base.load` reads the numbers.
    """

    parts: tuple[Part, ...]
    columns: int = 0  # 0: a vector
    shard: Shard = "none"
    unit: int = 1  # outputs, inputs or parts that sharding must not separate, such as the outputs of a head
    transposed: bool = False  # stored (columns, rows)
    add: float = 0.0  # added when loading, because some models store a norm's weight minus one
    table: bool = False  # also used as an embedding table, so quantization spends more bits on it
    exact: bool = False  # not quantized while loading, because near results decide, such as a router's
    heads: Heads = (0, 0)  # numbers of heads, if units are heads; (0, 0): as many as the parts have
    ranks: int = 1  # number of ranks that share it, set by the pass `shard`

    @property
    def rows(self) -> int:
        """Number of rows that one rank holds."""
        if self.shard == "part":
            return self.axis(len(self.parts)).share(self.ranks) * self.parts[0].rows
        return sum(self.local(part) for part in self.parts)

    @property
    def width(self) -> int:
        """Number of columns that one rank holds; 0: a vector."""
        return self.axis(self.columns).share(self.ranks) if self.shard == "row" else self.columns

    @property
    def size(self) -> int:
        """Number of elements that one rank holds."""
        return self.rows * max(1, self.width)

    def local(self, part: Part) -> int:
        """Return the number of a part's rows that one rank holds, zeros included."""
        return self.axis(part.rows).share(self.ranks) if self.shard in ("column", "vocab") else part.rows

    def axis(self, size: int) -> Axis:
        """Return the axis that ranks share, of so many elements."""
        return Axis(size, self.unit, self.heads)

    @property
    def name(self) -> str:
        """Name of the first part."""
        return self.parts[0].name
