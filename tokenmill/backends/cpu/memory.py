"""Memory that the rows of a step table point to: values, weight panels, vectors, cosines and sines, and the KV cache.

Invariant: everything is allocated once and addresses never change, so the table is written only once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.division import Division
from tokenmill.backends.cpu.items import Items
from tokenmill.backends.cpu.pack import Packed, pack_vector
from tokenmill.backends.cpu.peers import Peers
from tokenmill.backends.cpu.rooms import Rooms
from tokenmill.backends.cpu.scratch import padded, zeros
from tokenmill.backends.cpu.states import STATE_KERNELS, States
from tokenmill.backends.steps import cache_plan
from tokenmill.program import ops, special
from tokenmill.program.buffers import ALIGN, Plan, plan_buffers
from tokenmill.program.cost import cache_layout
from tokenmill.program.encoded import CrossAttention, DecoderAttention, EncoderAttention, StoreInput
from tokenmill.program.keeps import CacheSpec
from tokenmill.program.ops import Op, Weight
from tokenmill.program.rope import RopeTable
from tokenmill.program.value import Buffer, Program, Value

AttentionOp = ops.Attention | ops.LatentAttention | EncoderAttention | DecoderAttention | CrossAttention
"""Operations that attend to pages of the cache"""

_SPANS: dict[type[Op], str] = {EncoderAttention: "input", DecoderAttention: "answer", CrossAttention: "cross"}

_ALONE = Division()

Array = NDArray[Any]
Floats = NDArray[np.float32]


class Place(NamedTuple):
    """The address of a value's first row, the bytes from row to row, and the address of its scales (0 if float32)."""

    address: int
    stride: int
    scales: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """The dimensions that determine a step's memory."""

    tokens: int  # maximum of a step
    samples: int  # maximum of sampling rows
    context: int  # tokens of the longest sequence
    threads: int
    kv_dtype: str  # "f16" or "int8"
    slots: int = 0  # sequences at once, of which each has a state; 0: the program is not run

    def rows(self, buffer: Buffer) -> int:
        """Return the rows of a buffer. There are at least FEW for each thread, for its private copy of few rows."""
        rows = {"tokens": self.tokens, "samples": self.samples, "inputs": self.context}[buffer.rows]
        return max(rows, layout.FEW * self.threads)

    def bytes_of(self, buffer: Buffer) -> int:
        """Return the bytes of a buffer with all its rows."""
        if buffer.dtype == "int8":
            return self.rows(buffer) * (buffer.width + buffer.width // 4)
        return self.rows(buffer) * _stride(buffer)


@dataclass(frozen=True, slots=True)
class CosSinTable:
    """The cosines and sines of one rotary embedding, for the tokens of a step.

    `rows`: (tokens, 2 · n), for each token n cosines, then n sines; n is padded to a multiple of 16. `frequencies`:
    (1, n), or (positions, n) if frequencies depend on the position.
    """

    table: RopeTable
    rows: Floats
    frequencies: Floats

    @staticmethod
    def of(table: RopeTable, sizes: Sizes) -> CosSinTable:
        """Allocate rows for the largest step and compute the frequencies."""
        found = table.frequencies_at(np.arange(sizes.context)) if table.moves else table.inverse_frequencies()[None]
        width = -(-found.shape[1] // 16) * 16
        frequencies: Floats = zeros((len(found), width), np.float32)
        frequencies[:, : found.shape[1]] = found
        return CosSinTable(table, zeros((sizes.tokens, 2 * width), np.float32), frequencies)

    @property
    def columns(self) -> dict[int, int]:
        """Columns of a table row that reads this table."""
        half = self.table.rotary_dim // 2
        return {
            layout.ROPE: self.rows.ctypes.data,
            layout.ROPE_HALF: half,
            layout.ROPE_STRIDE: self.rows.strides[0],
            layout.ROPE_INTERLEAVED: int(self.table.interleaved),
        }


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The shape that attention kernels are compiled for: `attention_tiles.Heads` for code without numba."""

    kv_dtype: str
    dim: int
    count: int  # key-value heads, or groups of heads that share a page
    group: int  # query heads of each
    capped: bool
    alibi: bool = False
    sinks: bool = False
    latent: int = 0
    span: str = ""  # as in `attention_tiles.Heads`

    @staticmethod
    def of(op: AttentionOp, kv_dtype: str) -> AttentionShape:
        """Return the shape of one operation. Heads that share a page are cut into groups that fill a tile."""
        if isinstance(op, EncoderAttention | DecoderAttention | CrossAttention):
            return AttentionShape(kv_dtype, op.head_dim, op.q.width // op.head_dim, 1, False, span=_SPANS[type(op)])
        if isinstance(op, ops.LatentAttention):
            heads, dim = op.q.width // op.head_dim, op.latent.width + op.key.width
            group = max(n for n in range(1, layout.SCORE_ROWS + 1) if heads % n == 0)
            return AttentionShape(kv_dtype, dim, heads // group, group, False, latent=op.latent.width)
        count, group = op.k.width // op.head_dim, op.q.width // op.k.width
        return AttentionShape(kv_dtype, op.head_dim, count, group, bool(op.softcap), bool(op.alibi), bool(op.sinks))

    @property
    def name(self) -> str:
        """The shape as a part of the kernels' names."""
        extras = "".join(f"_{name}" for name in ("capped", "alibi", "sinks") if getattr(self, name))
        extras += f"_latent{self.latent}" if self.latent else ""
        extras += f"_{self.span}" if self.span else ""
        return f"{self.kv_dtype}_{self.dim}x{self.group}{extras}"

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.count * self.group

    @property
    def item_rows(self) -> int:
        """Query rows of an item: as many as fill the registers together with their heads."""
        return max(1, layout.SCORE_ROWS // self.group)

    @property
    def pairs(self) -> int:
        """The number of (query row, head) pairs of an item."""
        return self.item_rows * self.group


def page_bytes(key: int, value: int, kv_dtype: str) -> int:
    """Return the bytes of a page: 16 tokens of one key-value head of so many columns (`pages.py`)."""
    return layout.BLOCK * (2 * (key + value) if kv_dtype == "f16" else key + value + 8)


def cache_bytes(spec: CacheSpec, kv_dtype: str) -> int:
    """Return the bytes of 16 tokens of a layer's cache. Of compressed rows, the latent is stored as value as well."""
    first, second = spec.parts
    if first.name == "latent":
        return page_bytes(first.width + second.width, first.width, kv_dtype)
    return first.heads * page_bytes(first.width, second.width, kv_dtype)


class Plans(NamedTuple):
    """Offsets of all values: within the arena of this rank, or within the memory that the ranks share."""

    own: Plan
    shared: Plan
    sizes: Sizes  # of buffers in shared memory


def plans_of(program: Program, sizes: Sizes, private: frozenset[int], division: Division) -> Plans:
    """Assign offsets to all values.

    The inputs of TakeRows stay alive to the end of the step, because prompt log-probabilities take rows again.
    """
    taken = frozenset(op.x.buffer for op in program.ops if isinstance(op, ops.TakeRows))
    alike = replace(sizes, threads=sizes.threads * division.ranks)  # private copies are of the threads of all ranks

    def shared_bytes(buffer: Buffer) -> int:
        copies = division.ranks if buffer.id in division.slots else 1
        return copies * -(-alike.bytes_of(buffer) // ALIGN) * ALIGN

    def is_private(op: Op) -> bool:
        return op.out.buffer in private

    own = plan_buffers(program, sizes.bytes_of, is_private, taken, lambda buffer: not division.shares(buffer))
    shared = plan_buffers(program, shared_bytes, is_private, taken, division.shares, division.free_after)
    return Plans(own, shared, alike)


class Memory:
    """The memory of one program.

    `panels`: packed weights. `vector`: reads a weight that is a vector. `private`: buffers of which each thread holds a
    private copy while rows are few. `division`, `peers`: of the ranks that share the model; without `peers`, what they
    would share is memory of this process. The KV cache is allocated later (`allocate`), and its columns are written
    then.
    """

    def __init__(
        self,
        program: Program,
        sizes: Sizes,
        panels: dict[Weight, tuple[Packed, ...]],
        vector: Callable[[Weight], Floats],
        private: frozenset[int],
        division: Division = _ALONE,
        peers: Callable[[int], Peers] | None = None,
    ) -> None:
        self.program, self.sizes, self.private, self.division = program, sizes, private, division
        self._plans = plans_of(program, sizes, private, division)
        self.plan = self._plans.own
        self.peers = peers(self._plans.shared.size) if peers is not None else None
        self._shared = zeros((self._plans.shared.size,)) if self.peers is None else self.peers.values
        self.rank = 0 if self.peers is None else self.peers.rank
        self.cache_plan = cache_plan(cache_layout(program), sizes.context, cache_layout(program.model))
        self.arena = zeros((self.plan.size,))
        self.items = Items(program, sizes.rows)
        self.rooms = Rooms(program, sizes.rows)
        self.states = States(program, sizes.slots)
        self._panels, self._read = panels, vector
        self._vectors: dict[tuple[Weight, bool], Floats] = {}
        self._arrays: dict[object, Floats] = {}  # constants, by what determines them
        self._cos_sin: dict[RopeTable, CosSinTable] = {}
        self._cache: Array = zeros((0,))
        self.num_pages = 0

    def close_source(self) -> None:
        """Release the checkpoint, so that its file need not stay mapped. Call after all weights were read."""
        self._read = _closed

    # ---- values ----

    def place(self, v: Value) -> Place:
        """Return the location of a value."""
        array, at, sizes = self._home(v)
        base = array.ctypes.data + at
        if v.spec.dtype == "int8":
            return Place(base, v.spec.width, base + sizes.rows(v.spec) * v.spec.width)
        return Place(base + v.start * 4, _stride(v.spec), 0)

    def copy_of_first_thread(self, v: Value) -> int:
        """Return the number of the private copy of this rank's first thread, from 1 on; 0: threads have none."""
        if v.buffer not in self.private:
            return 0
        return 1 + (self.rank * self.sizes.threads if self.division.shares(v.buffer) else 0)

    def result(self, v: Value) -> Place:
        """Return where an operation writes its result: of a value that ranks write together, this rank's columns."""
        at = self.place(v)
        return at if v.whole else at._replace(address=at.address + 4 * self.rank * v.width)

    def _home(self, v: Value) -> tuple[Array, int, Sizes]:
        """Return the array that holds a value, its offset, and the sizes of buffers there."""
        if not self.division.shares(v.buffer):
            return self.arena, self.plan.offsets[v.buffer], self.sizes
        at = self._plans.shared.offsets[v.buffer]
        if v.buffer in self.division.slots:
            at += self.rank * self._slot_bytes(v)
        return self._shared, at, self._plans.sizes

    def slots(self, v: Value) -> tuple[int, int]:
        """Return the address of rank 0's part of a value that each rank has one of, and the bytes from rank to rank."""
        return self._shared.ctypes.data + self._plans.shared.offsets[v.buffer], self._slot_bytes(v)

    def _slot_bytes(self, v: Value) -> int:
        return -(-self._plans.sizes.bytes_of(v.spec) // ALIGN) * ALIGN

    def view(self, v: Value, rows: int) -> Floats:
        """Return the first rows of a float32 value, (rows, width)."""
        (array, at, _), stride = self._home(v), _stride(v.spec)
        whole = array[at : at + rows * stride].view(np.float32).reshape(rows, -1)
        return whole[:, v.start : v.start + v.width]

    # ---- weights ----

    def panels(self, weight: Weight) -> tuple[Packed, ...]:
        """Return a packed matrix; several parts, one below the other, if parts are stored differently."""
        return self._panels[weight]

    def vector(self, weight: Weight | None, gated: bool = False) -> int:
        """Return the address of a vector, padded to a multiple of 16; 0 for None.

        `gated`: 32 elements of gate alternate with 32 of up.
        """
        if weight is None:
            return 0
        if (weight, gated) not in self._vectors:
            self._vectors[weight, gated] = pack_vector(self._read(weight), gated=gated)
        return self._vectors[weight, gated].ctypes.data

    def numbers(self, weight: Weight) -> Floats:
        """Return the numbers of a weight, (rows, columns) or (rows,), of which the caller makes constants."""
        return self._read(weight)

    def array(self, key: object, make: Callable[[], Any]) -> int:
        """Return the address of an array of constants, which operations of an equal `key` share, padded to vectors."""
        if key not in self._arrays:
            self._arrays[key] = padded(np.asarray(make(), np.float32))
        return self._arrays[key].ctypes.data

    def constant(self, width: int, number: float) -> int:
        """Return the address of a vector of equal numbers, for a norm without a weight or a bias."""
        return self.array((width, number), lambda: np.full(width, number))

    def slopes(self, alibi: tuple[float, ...], heads: int) -> int:
        """Return the address of the slopes of ALiBi for this rank's heads; 0 if there are none."""
        own = alibi[self.rank * heads :][:heads]
        return self.array(own, lambda: own) if own else 0

    def growth(self, op: special.ScaleByPosition) -> int:
        """Return the address of the factors by which queries grow, one for each `length` positions."""
        steps = np.arange((self.sizes.context + op.offset) // op.length + 1)
        return self.array((op.beta, op.length, len(steps)), lambda: 1 + op.beta * np.log1p(steps))

    def cos_sin(self, table: RopeTable) -> CosSinTable:
        """Return the cosines and sines of a rotary embedding; layers share them."""
        if table not in self._cos_sin:
            self._cos_sin[table] = CosSinTable.of(table, self.sizes)
        return self._cos_sin[table]

    def all_cos_sin(self) -> list[CosSinTable]:
        """Return all tables of cosines and sines that rows of the step table read."""
        return list(self._cos_sin.values())

    # ---- cache ----

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of one block over all its parts."""
        return block_size // layout.BLOCK * sum(self._part_bytes())

    def _part_bytes(self) -> list[int]:
        """Return the bytes of 16 tokens, by part of a block."""
        return [cache_bytes(spec, self.sizes.kv_dtype) for spec in self.cache_plan.parts]

    def allocate(self, num_pages: int) -> None:
        """Allocate states, and the KV cache, with all parts of a block side by side.

        The system commits memory when it is first written to. Raises MemoryError if the cache does not fit.
        """
        self.states.allocate()
        self._cache = zeros((num_pages, sum(self._part_bytes())))
        self.num_pages = num_pages

    def kept(self, op: Op, kernel: str, table_bytes: int) -> dict[int, int]:
        """Return the columns of a row of `op` that access what it keeps between steps. Call after `allocate`.

        `kernel`: that of the row. `table_bytes`: of one block table of a slot.
        """
        if op.state() is not None:
            return self.states.columns(op) if kernel in STATE_KERNELS else {}
        spec = op.keeps()
        layer = spec.layer if spec is not None else layer_of(op)
        if layer is None or not kernel.startswith(("write_", "attend_")):
            return {}
        table, part = self.cache_plan.places[layer]
        before = sum(self._part_bytes()[:part])
        return {
            layout.CACHE: self._cache.ctypes.data + before,
            layout.PAGE_STRIDE: self._cache.strides[0],
            layout.TABLE_AT: table * table_bytes,
        }

    def clear_pages(self, pages: slice) -> None:
        """Reset pages to zeros."""
        self._cache[pages] = 0


def layer_of(op: Op) -> int | None:
    """Return the layer whose cache an operation accesses that declares none itself; None: it accesses none.

    While the encoder runs, pages of the first layer hold its keys and values.
    """
    if isinstance(op, EncoderAttention):
        return 0
    return op.layer if isinstance(op, StoreInput | CrossAttention) else None


def _closed(weight: Weight) -> Floats:
    raise RuntimeError(f"{weight.name} was to be read after the table was written")


def _stride(buffer: Buffer) -> int:
    return -(-buffer.width // 16) * 64
