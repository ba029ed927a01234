"""Launches of operations with a state.

Single tokens are computed one by one. Runs are computed in chunks by products of tiles where the recurrence allows it;
batch-invariant sums are those of one token after another, in any row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tokenmill.backends.cuda.kernels import delta, lru, scan, states
from tokenmill.backends.cuda.kernels.prefill import tile_each
from tokenmill.backends.cuda.launch import Run, Site
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.shapes import power
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.cuda.states import SHAPES, SHAPES_OF_FLOAT32, CudaStates, StateShapes
from tokenmill.program.ops import Op, Weight
from tokenmill.program.recurrence import CausalConv, DeltaRule, RgLru, StateSpace

RUN = 1 << 30
"""Most tokens of a tile that is a whole run."""


class _Chunks(NamedTuple):
    """Scratch of the delta rule in chunks, shared by all layers: see `ready_chunks`."""

    inverses: Tensor
    w: Tensor
    u: Tensor
    scores: Tensor
    last: Tensor
    queries: Tensor | None  # of rules with a decay for each column
    keys: Tensor | None
    of_q: Tensor  # of the others
    of_k: Tensor


class StateLowering:
    """Lowers operations with a state. `weights`: those on the device. `shapes`: None for those of the dtype."""

    def __init__(
        self,
        memory: Memory,
        weights: Mapping[Weight, Tensor],
        states: CudaStates,
        shapes: StateShapes | None = None,
        batch_invariant: bool = False,
    ) -> None:
        self._memory, self._weights, self._states = memory, weights, states
        self._shapes = shapes or (SHAPES if memory.dtype.itemsize == 2 else SHAPES_OF_FLOAT32)
        found = [op for op in memory.program.ops if op.state() is not None]
        self.tile_tokens = {RUN} if found else set[int]()
        self._tiles: Tensor | None = None
        if found and batch_invariant:
            self._tiles = memory.queries.new_empty(4 * memory.limits.max_batch_tokens, dtype=torch.int32)
        in_chunks = [] if batch_invariant else found
        rules = [op for op in in_chunks if isinstance(op, DeltaRule)]
        scans = [op for op in in_chunks if isinstance(op, StateSpace) and not op.a_log.columns]
        self._scratch = self._chunks(rules) if rules else None
        self._scan_scratch = self._parts_of_scans(scans) if scans else None
        units = [op for op in found if isinstance(op, RgLru)]
        self._gates = {op.layer: self._gates_of(op) for op in units}
        self._lru_scratch = self._parts_of_units(units) if units else None
        if rules or scans or units:
            self.tile_tokens.add(self._shapes.chunk)

    @property
    def nbytes(self) -> int:
        """Bytes of scratch and of copies of weights."""
        gates = (part for pair in self._gates.values() for part in pair)
        tiles = [] if self._tiles is None else [self._tiles]
        chunks = [tensor for tensor in self._scratch or () if tensor is not None]
        held = [*chunks, *(self._scan_scratch or ()), *(self._lru_scratch or ()), *gates, *tiles]
        return sum(tensor.nbytes for tensor in held)

    def by_kind(self) -> dict[type[Op], Callable[[Any], Run]]:
        """Return the function that lowers each kind."""
        return {CausalConv: self._conv, StateSpace: self._scan, DeltaRule: self._delta, RgLru: self._lru}

    def _optional(self, weight: Weight | None, instead: Tensor) -> Tensor:
        return instead if weight is None else self._weights[weight]

    def _one_by_one(self) -> Callable[[Sizes], Iterator[tuple[int, Tensor]]]:
        """Return a function that yields numbers of rows and their tiles: of single tokens, then of runs."""
        each, tiles = Site(tile_each), self._tiles
        assert tiles is not None

        def rows(n: Sizes) -> Iterator[tuple[int, Tensor]]:
            if singles := singles_of(n):
                pairs, some, _ = rows_of(n)
                each((singles,), pairs, some, tiles, SOME=n.singles is not None, num_warps=1)
                yield singles, tiles
            if runs_of(n):
                yield runs_of(n), n.tiles[RUN]

        return rows

    # ---- short convolutions

    def _conv(self, op: CausalConv) -> Run:
        x, out, ring = self._memory.value(op.x), self._memory.value(op.out), self._states.ring(op.state())
        weight, bias = self._weights[op.weight], self._optional(op.bias, x)
        width, taps = weight.shape
        of_all, of_runs = Site(states.convolve), Site(states.keep_inputs)

        def run(n: Sizes) -> None:
            tokens, columns = (4, 256) if n.singles is None else (32, 128)
            of_all(
                (triton.cdiv(n.tokens, tokens), triton.cdiv(width, columns)),
                x, weight, bias, ring, n.pairs, out, x.stride(0), n.tokens, WIDTH=width, TAPS=taps,
                BIAS=op.bias is not None, ACT=op.act or "", BT=tokens, BC=columns, num_warps=4,
            )  # fmt: skip
            if runs_of(n):
                of_runs(
                    (runs_of(n), triton.cdiv(width, 256)),
                    x, ring, n.tiles[RUN], x.stride(0), WIDTH=width, TAPS=taps, BR=power(taps - 1), BC=256, num_warps=4,
                )  # fmt: skip

        return run

    # ---- Mamba

    def _scan(self, op: StateSpace) -> Run:
        values = [self._memory.value(v) for v in (op.x, op.dt, op.b, op.c)]
        weights = [self._weights[op.a_log], self._weights[op.d], self._optional(op.dt_bias, values[0])]
        tensors = *values, *weights, self._states.ring(op.state()), self._memory.value(op.out)
        numbers = *(v.stride(0) for v in values), *map(float, op.limits)
        heads, width, columns = op.state().shape
        options = {"BIAS": op.dt_bias is not None, "LIMITED": op.limits != (0.0, math.inf)}
        if op.a_log.columns:
            return self._scan_columns(tensors, numbers, heads, columns, options)
        block, shapes = max(16, power(columns)), self._shapes
        some, kernel = max(1, min(power(width), shapes.tile // block)), Site(scan.scan_heads)

        def one_by_one(count: int, rows: tuple[Tensor, ...], n: Sizes | None = None) -> None:
            kernel(
                (count, heads, triton.cdiv(width, some)),
                *tensors, *rows, *numbers, HEADS=heads, GROUPS=op.groups, P=width, N=columns, BP=some,
                BN=power(columns), **options, **where(n), STAGES=1, num_warps=shapes.tile_warps,
            )  # fmt: skip

        return self._either(one_by_one, lambda: self._scan_runs(op, tensors, options))

    def _scan_runs(self, op: StateSpace, tensors: tuple[Tensor, ...], options: dict[str, bool]) -> Run:
        assert self._scan_scratch is not None
        x, dt, b, c, a_log, d, bias, ring, out = tensors
        heads, width, columns = op.state().shape
        shapes, scratch = self._shapes, self._scan_scratch
        unit, strides = in_units(x, dt, b, c)
        chunk, block = shapes.chunk, max(16, power(columns))
        sizes = {"TOKENS": self._memory.limits.max_batch_tokens, "HEADS": heads, "GROUPS": op.groups}
        together = max(16, min(shapes.scan_columns * 128 // max(block, 128), power(width)))
        some = min(32, power(heads))
        before, behind = Site(scan.ready_scan), Site(scan.scan_chunks)

        def run(n: Sizes) -> None:
            before(
                (len(n.tiles[chunk]), op.groups + triton.cdiv(heads, some)),
                dt, b, c, a_log, bias, n.tiles[chunk], *scratch, *strides[1:], *map(float, op.limits), **sizes,
                N=columns, L=chunk, BH=some, BN=block, UNIT=unit, **options, num_warps=4,
            )  # fmt: skip
            behind(
                (runs_of(n), heads, triton.cdiv(width, together)),
                x, b, c, d, *scratch, ring, out, n.tiles[RUN], strides[0], *strides[2:], **sizes, P=width, N=columns,
                L=chunk, BP=together, BN=block, UNIT=unit, STAGES=shapes.scan_stages, num_warps=shapes.scan_warps,
            )  # fmt: skip

        return run

    def _scan_columns(
        self,
        tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...],
        width: int,
        columns: int,
        options: dict[str, bool],
    ) -> Run:
        block, shapes = power(columns), self._shapes
        sizes = {"WIDTH": width, "N": columns}
        kernel, of_chunks = Site(scan.scan_columns), Site(scan.scan_column_chunks)
        unit, strides = in_units(*tensors[:4])

        def one_by_one(count: int, rows: tuple[Tensor, ...], n: Sizes | None = None) -> None:
            kernel(
                (count, triton.cdiv(width, 64)),
                *tensors, *rows, *numbers, **sizes, BC=64, BN=block, **options, **where(n), STAGES=1, num_warps=2,
            )  # fmt: skip

        def in_chunks(n: Sizes) -> None:
            of_chunks(
                (runs_of(n), triton.cdiv(width, shapes.channels)),
                *tensors, n.tiles[RUN], *strides, *numbers[4:], **sizes, L=shapes.channel_chunk, BC=shapes.channels,
                BN=block, UNIT=unit, **options, STAGES=shapes.channel_stages, num_warps=1,
            )  # fmt: skip

        return self._either(one_by_one, lambda: in_chunks)

    def _either(self, one_by_one: Callable[..., None], in_chunks: Callable[[], Run]) -> Run:
        """Return the launches for single tokens and for runs, of which only those of invariant sums are one by one.

        `one_by_one(rows, tensors that name them, sizes)`; `in_chunks()`: launches for runs.
        """
        if self._tiles is not None:
            rows = self._one_by_one()

            def invariant(n: Sizes) -> None:
                for count, tiles in rows(n):
                    one_by_one(count, (n.pairs, n.pairs, tiles))

            return invariant
        of_runs = in_chunks()

        def run(n: Sizes) -> None:
            if singles := singles_of(n):
                one_by_one(singles, rows_of(n), n)
            if runs_of(n):
                of_runs(n)

        return run

    def _parts_of_scans(self, scans: list[StateSpace]) -> tuple[Tensor, Tensor, Tensor]:
        """Return scratch of scans in chunks, shared by all layers: see `ready_scan`."""
        tokens, device = self._memory.limits.max_batch_tokens, self._memory.device.torch
        heads, groups = max(op.dt.width for op in scans), max(op.groups for op in scans)
        steps, totals = torch.empty(2, heads * tokens, device=device).unbind(0)
        scores = torch.empty(tokens * groups * self._shapes.chunk, dtype=self._memory.dtype, device=device)
        return steps, totals, scores

    # ---- the delta rule

    def _chunks(self, rules: list[DeltaRule]) -> _Chunks:
        limits, dtype, device = self._memory.limits, self._memory.dtype, self._memory.device.torch
        tokens, chunk = limits.max_batch_tokens, self._shapes.chunk
        chunks = tokens // chunk + limits.max_batch_size + tokens // min(limits.block_size, tokens)
        shapes = [op.state().shape for op in rules]
        keys, values = max(h * n for h, n, _ in shapes), max(h * p for h, _, p in shapes)
        most_heads, last = max(h for h, _, _ in shapes), max(op.a.width for op in rules)
        scores = most_heads * chunk

        def made(rows: int, width: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(rows * width, dtype=kind, device=device)

        by_column = [op for op in rules if op.a.width != op.b.width]
        queries, the_keys = (made(tokens, keys) if by_column else None for _ in range(2))
        of_q, of_k = (made(tokens, most_heads, torch.float32) for _ in range(2))
        return _Chunks(
            made(tokens, 16 * most_heads, torch.float32), made(tokens, keys), made(tokens, values),
            made(tokens, scores), made(chunks, last, torch.float32), queries, the_keys, of_q, of_k,
        )  # fmt: skip

    def _delta(self, op: DeltaRule) -> Run:
        heads, columns, width = op.state().shape
        values = [self._memory.value(v) for v in (op.q, op.k, op.v, op.a, op.b)]
        inputs = *values, self._weights[op.a_log], self._weights[op.dt_bias]
        ends = self._states.ring(op.state()), self._memory.value(op.out)
        numbers = op.rate, columns**-0.5
        sizes = {"HEADS": heads, "SHARED": heads // (op.k.width // columns), "N": columns, "P": width}
        each, shapes = op.a.width != heads, self._shapes
        some, kernel = max(1, min(power(width), shapes.tile // max(16, power(columns)))), Site(delta.correct_rows)

        def one_by_one(count: int, rows: tuple[Tensor, ...], n: Sizes | None = None) -> None:
            kernel(
                (count, heads, triton.cdiv(width, some)),
                *inputs, *ends, *rows, *(v.stride(0) for v in values), *numbers, **sizes, BN=power(columns), BP=some,
                EACH=each, **where(n), STAGES=1, num_warps=shapes.tile_warps,
            )  # fmt: skip

        return self._either(one_by_one, lambda: self._delta_runs(inputs, ends, numbers, sizes, each))

    def _delta_runs(
        self,
        inputs: tuple[Tensor, ...],
        ends: tuple[Tensor, ...],
        numbers: tuple[float, float],
        sizes: dict[str, int],
        each: bool,
    ) -> Run:
        assert self._scratch is not None
        unit, strides = in_units(*inputs[:5])
        shapes, width, columns = self._shapes, sizes["P"], sizes["N"]
        tokens, chunk, block = self._memory.limits.max_batch_tokens, shapes.chunk, max(16, power(columns))
        together = max(16, min(shapes.delta_columns, power(width)))
        inverses, w, u, scores, last, queries, keys, of_q, of_k = self._scratch
        if queries is not None and keys is not None and each:
            made, reads = (queries, keys), (queries, keys)
            own = [sizes["HEADS"] * columns // unit] * 2, sizes | {"SHARED": 1}
        else:
            made, reads = (of_q, of_k), (inputs[0], inputs[1])
            own = strides[:2], sizes
        most = {"maxnreg": shapes.ready_registers} if shapes.ready_registers else {}
        first, before, behind = Site(delta.invert_blocks), Site(delta.ready_chunks), Site(delta.correct_chunks)
        _, k, _, *others = inputs
        heads_of_keys = {name: sizes[name] for name in ("HEADS", "SHARED", "N")}

        def run(n: Sizes) -> None:
            first(
                (len(n.tiles[chunk]) * (chunk // 16), sizes["HEADS"]),
                k, *others, n.tiles[chunk], inverses, strides[1], *strides[3:], numbers[0], **heads_of_keys,
                BLOCKS=chunk // 16, BN=block, UNIT=unit, EACH=each, num_warps=1,
            )  # fmt: skip
            before(
                (len(n.tiles[chunk]), sizes["HEADS"]),
                *inputs, n.tiles[chunk], inverses, w, u, scores, last, *made, *strides, *numbers, TOKENS=tokens,
                **sizes, L=chunk, BN=block, BP=max(16, power(width)), UNIT=unit, EACH=each,
                num_warps=shapes.ready_warps * (1 + each), **most,
            )  # fmt: skip
            behind(
                (runs_of(n), sizes["HEADS"], triton.cdiv(width, together)),
                *reads, w, u, scores, last, of_q, of_k, *ends, n.tiles[RUN], *own[0], TOKENS=tokens, **own[1], L=chunk,
                BN=block, BP=together, UNIT=unit, EACH=each, STAGES=shapes.delta_stages, num_warps=shapes.delta_warps,
            )  # fmt: skip

        return run

    # ---- Griffin

    def _gates_of(self, op: RgLru) -> tuple[Tensor, Tensor]:
        """Return the matrices (2, heads, columns, columns) and biases (2, heads, columns) of both gates."""
        matrices = [torch.stack([self._weights[w] for w in ws]) for ws in (op.input_gate, op.recurrence_gate)]
        return torch.stack(matrices), torch.stack([self._weights[w] for w in (op.input_bias, op.recurrence_bias)])

    def _parts_of_units(self, units: list[RgLru]) -> tuple[Tensor, ...]:
        """Return scratch of decays and of what is added, shared by all layers: see `lru_gates`."""
        rows, widest = self._memory.limits.max_batch_tokens, max(op.x.width for op in units)
        return torch.empty(2, rows * widest, device=self._memory.device.torch).unbind(0)

    def _lru(self, op: RgLru) -> Run:
        assert self._lru_scratch is not None
        x, out, ring = self._memory.value(op.x), self._memory.value(op.out), self._states.ring(op.state())
        gates = x, *self._gates[op.layer], self._weights[op.a]
        decays, added = self._lru_scratch
        heads, width = len(op.input_gate), op.x.width // len(op.input_gate)
        shapes, padded = self._shapes, max(16, power(width))
        sizes = {"HEADS": heads, "D": width, "BK": min(64, padded), "BC": min(32, padded)}
        columns = triton.cdiv(width, sizes["BC"])
        of_singles, before, behind = Site(lru.lru_single), Site(lru.lru_gates), Site(lru.lru_runs)

        def run(n: Sizes) -> None:
            if singles := singles_of(n):
                pairs, rows, _ = rows_of(n)
                of_singles(
                    (triton.cdiv(singles, 16), heads, columns),
                    *gates, ring, out, pairs, rows, x.stride(0), singles, **sizes, BM=16, SOME=n.singles is not None,
                    num_warps=4,
                )  # fmt: skip
            if runs := runs_of(n):
                before(
                    (len(n.tiles[shapes.chunk]), heads, columns),
                    *gates, n.tiles[shapes.chunk], decays, added, x.stride(0), **sizes, L=shapes.chunk, num_warps=4,
                )  # fmt: skip
                behind(
                    (runs, triton.cdiv(heads * width, shapes.lru_columns)),
                    decays, added, ring, out, n.tiles[RUN], WIDTH=heads * width, BC=shapes.lru_columns,
                    L=shapes.lru_chunk, STAGES=shapes.lru_stages, num_warps=1,
                )  # fmt: skip

        return run


def where(n: Sizes | None) -> dict[str, bool]:
    """Return SOME and RUNS of a kernel that computes the single tokens of `n`, or with None the rows of tiles."""
    return {"SOME": n is not None and n.singles is not None, "RUNS": n is None}


def in_units(*values: Tensor) -> tuple[int, list[int]]:
    """Return a unit, 8 or 1, and the strides of rows in it: kernels load vectors if strides are known multiples."""
    unit = 1 if any(v.stride(0) % 8 for v in values) else 8
    return unit, [v.stride(0) // unit for v in values]


def singles_of(n: Sizes) -> int:
    """Return the number of rows of a single token."""
    return n.tokens if n.singles is None else len(n.singles)


def runs_of(n: Sizes) -> int:
    """Return the number of rows of several tokens."""
    return len(n.tiles[RUN]) if RUN in n.tiles else 0


def rows_of(n: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Return `pairs_ptr`, `rows_ptr` and `runs_ptr` of a kernel that computes single tokens."""
    return n.pairs, n.pairs if n.singles is None else n.singles, n.pairs
