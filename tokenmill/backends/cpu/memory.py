"""Where everything lies that a table's rows point to: values, panels of weights, vectors, rotations, caches, scratch.

All of it is allocated once; addresses never change, so the table is written once, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.pack import Packed, pack_vector
from tokenmill.backends.cpu.scratch import zeros
from tokenmill.program import ops
from tokenmill.program.buffers import Plan, plan_buffers
from tokenmill.program.cost import cache_layout
from tokenmill.program.ops import Weight
from tokenmill.program.rope import RopeTable
from tokenmill.program.value import Buffer, Program, Value

Array = NDArray[Any]
Floats = NDArray[np.float32]


class Place(NamedTuple):
    """A value: its first row, bytes from row to row, and its scales if it is int8."""

    address: int
    stride: int
    scales: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What decides how much memory a step needs."""

    tokens: int  # of a step, at most
    samples: int  # rows that sample, at most
    context: int  # tokens of the longest sequence
    threads: int
    kv_dtype: str  # "f16" or "int8"

    def rows(self, buffer: Buffer) -> int:
        """Rows of a buffer: with few of them, each thread has some of its own."""
        rows = self.tokens if buffer.rows == "tokens" else self.samples
        return max(rows, layout.FEW * self.threads)

    def bytes_of(self, buffer: Buffer) -> int:
        """Of a buffer with all its rows."""
        if buffer.dtype == "int8":
            return self.rows(buffer) * (buffer.width + buffer.width // 4)
        return self.rows(buffer) * _stride(buffer)


@dataclass(frozen=True, slots=True)
class CosSinTable:
    """Of one rotation: a row of cosines, then sines, for each token of a step, both in whole vectors.

    `frequencies`: (1, n), or a row for each position if they depend on it.
    """

    table: RopeTable
    rows: Floats
    frequencies: Floats

    @staticmethod
    def of(table: RopeTable, sizes: Sizes) -> CosSinTable:
        """Room for the largest step."""
        found = table.frequencies_at(np.arange(sizes.context)) if table.moves else table.inverse_frequencies()[None]
        width = -(-found.shape[1] // 16) * 16
        frequencies: Floats = zeros((len(found), width), np.float32)
        frequencies[:, : found.shape[1]] = found
        return CosSinTable(table, zeros((sizes.tokens, 2 * width), np.float32), frequencies)

    @property
    def columns(self) -> dict[int, int]:
        """Of a row that reads them."""
        half = self.table.rotary_dim // 2
        return {layout.ROPE: self.rows.ctypes.data, layout.ROPE_HALF: half, layout.ROPE_STRIDE: self.rows.strides[0]}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What attention of one shape is compiled for (`attention.py` has the same, with numba)."""

    kv_dtype: str
    dim: int
    count: int  # key-value heads
    group: int  # query heads of each
    capped: bool

    @staticmethod
    def of(op: ops.Attention, kv_dtype: str) -> AttentionShape:
        """Of one operation."""
        return AttentionShape(
            kv_dtype, op.head_dim, op.k.width // op.head_dim, op.q.width // op.k.width, bool(op.softcap)
        )

    @property
    def name(self) -> str:
        """Part of the kernels' names."""
        return f"{self.kv_dtype}_{self.dim}x{self.group}{'_capped' if self.capped else ''}"

    @property
    def item_rows(self) -> int:
        """Query rows of an item: with their heads they fill the registers."""
        return max(1, layout.SCORE_ROWS // self.group)

    @property
    def pairs(self) -> int:
        """(query row, head) pairs of an item."""
        return self.item_rows * self.group


def page_bytes(head_dim: int, kv_dtype: str) -> int:
    """Of 16 tokens of one key-value head (`pages.py`)."""
    return 2 * layout.BLOCK * head_dim * 2 if kv_dtype == "f16" else 2 * layout.BLOCK * (head_dim + 4)


def plan_of(program: Program, sizes: Sizes, private: frozenset[int]) -> Plan:
    """Places of the values within an arena. The values that rows are taken from live to the end of the step."""
    taken = frozenset(op.x.buffer for op in program.ops if isinstance(op, ops.TakeRows))
    return plan_buffers(program, sizes.bytes_of, lambda op: op.out.buffer in private, taken)


class Memory:
    """Of one program on this machine.

    `panels`: weights, packed. `vector`: reads one that is a vector. `private`: buffers of which each thread has a copy
    of its own while rows are few. The cache comes later (`allocate`): its rows of the table are written then.
    """

    def __init__(
        self,
        program: Program,
        sizes: Sizes,
        panels: dict[Weight, tuple[Packed, ...]],
        vector: Callable[[Weight], Floats],
        private: frozenset[int],
    ) -> None:
        self.program, self.sizes, self.private = program, sizes, private
        self.plan = plan_of(program, sizes, private)
        self.layout = cache_layout(program)
        self.arena = zeros((self.plan.size,))
        self._panels, self._read = panels, vector
        self._vectors: dict[tuple[Weight, bool], Floats] = {}
        self._no_bias: dict[int, Floats] = {}  # by width
        self._cos_sin: dict[RopeTable, CosSinTable] = {}
        self._cache: Array = zeros((0,))
        self.num_pages = 0

    def close_source(self) -> None:
        """Forget the checkpoint, so that its file need not stay mapped: everything was read."""
        self._read = _closed

    # ---- values ----

    def place(self, v: Value) -> Place:
        """Where a value is."""
        base = self.arena.ctypes.data + self.plan.offsets[v.buffer]
        if v.spec.dtype == "int8":
            return Place(base, v.spec.width, base + self.sizes.rows(v.spec) * v.spec.width)
        return Place(base + v.start * 4, _stride(v.spec), 0)

    def view(self, v: Value, rows: int) -> Floats:
        """A float value's first rows, (rows, width)."""
        at, stride = self.plan.offsets[v.buffer], _stride(v.spec)
        whole = self.arena[at : at + rows * stride].view(np.float32).reshape(rows, -1)
        return whole[:, v.start : v.start + v.width]

    # ---- weights ----

    def panels(self, weight: Weight) -> tuple[Packed, ...]:
        """A matrix; in several parts, one below the other, if they are stored differently."""
        return self._panels[weight]

    def vector(self, weight: Weight | None, gated: bool = False) -> int:
        """Address of a vector, in whole vectors of 16; 0 for none. `gated`: 32 of gate, 32 of up, and so on."""
        if weight is None:
            return 0
        if (weight, gated) not in self._vectors:
            self._vectors[weight, gated] = pack_vector(self._read(weight), gated=gated)
        return self._vectors[weight, gated].ctypes.data

    def no_bias(self, width: int) -> int:
        """Address of a vector of zeros, for a kernel that always adds a bias."""
        if width not in self._no_bias:
            self._no_bias[width] = zeros((-(-width // 16) * 16,), np.float32)
        return self._no_bias[width].ctypes.data

    def cos_sin(self, table: RopeTable) -> CosSinTable:
        """Where a step's cosines and sines go, and what they are made of."""
        if table not in self._cos_sin:
            self._cos_sin[table] = CosSinTable.of(table, self.sizes)
        return self._cos_sin[table]

    def all_cos_sin(self) -> list[CosSinTable]:
        """Those that rows of the table use."""
        return list(self._cos_sin.values())

    # ---- cache ----

    def block_bytes(self, block_size: int) -> int:
        """Of one block over all layers."""
        return block_size // layout.BLOCK * sum(self._layer_bytes().values())

    def _layer_bytes(self) -> dict[int, int]:
        """Of 16 tokens in each layer."""
        form = self.sizes.kv_dtype
        keys = {layer: spec.parts[0] for layer, spec in self.layout.items()}  # values are alike
        return {layer: key.heads * page_bytes(key.width, form) for layer, key in keys.items()}

    def allocate(self, num_pages: int) -> None:
        """Make the cache, all layers of a block together: memory is taken as blocks are first used.

        MemoryError if there is no room.
        """
        self._cache = zeros((num_pages, sum(self._layer_bytes().values())))
        self.num_pages = num_pages

    def cache(self, layer: int) -> dict[int, int]:
        """Columns of a row that reads a layer's cache; nothing in them before it is allocated."""
        if not len(self._cache):
            return {layout.CACHE: 0, layout.PAGE_STRIDE: 0}
        before = sum(size for index, size in self._layer_bytes().items() if index < layer)
        return {layout.CACHE: self._cache.ctypes.data + before, layout.PAGE_STRIDE: self._cache.strides[0]}

    def clear_pages(self, pages: slice) -> None:
        """Zeros, as at first."""
        self._cache[pages] = 0


def _closed(weight: Weight) -> Floats:
    raise RuntimeError(f"{weight.name} was to be read after the table was written")


def _stride(buffer: Buffer) -> int:
    return -(-buffer.width // 16) * 64
