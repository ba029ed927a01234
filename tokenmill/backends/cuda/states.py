"""States of fixed size by slot on the device, and the launches of operations that keep them.

A slot has a ring of two states, as on `backends.torch`. Kernels read the one before a row's first token and write the
one after its last, so a captured decode step needs nothing but the slots and positions of its tokens.

Single tokens are computed one by one. Runs are computed in chunks by products of tiles where the recurrence allows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tokenmill.backends.base import StepInputs
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.kernels import delta, lru, scan, states
from tokenmill.backends.cuda.launch import Run, Site
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.shapes import power
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.rings import RingProgress
from tokenmill.backends.steps import STATE_RING
from tokenmill.program.keeps import StateSpec
from tokenmill.program.ops import Op, Weight
from tokenmill.program.recurrence import CausalConv, DeltaRule, RgLru, StateSpace

RUN = 1 << 30
"""Most tokens of a tile that is a whole run."""


class StateShapes(NamedTuple):
    """Sizes of tiles, from measurements (`bench/gpu/states.py`).

    `tile`: numbers of a state that a program keeps for single tokens. `chunk`: tokens of a run that are computed at
    once. `…_columns`: columns of a head in a program, of Mamba without heads: channels.
    """

    tile: int = 8192
    tile_warps: int = 4
    chunk: int = 64
    scan_columns: int = 64
    scan_warps: int = 4
    scan_stages: int = 2
    ready_warps: int = 4
    delta_columns: int = 32
    delta_warps: int = 4
    delta_stages: int = 3
    channels: int = 8
    channel_chunk: int = 16  # 1: token by token
    channel_stages: int = 2
    lru_chunk: int = 64
    lru_columns: int = 32


SHAPES = StateShapes()
SHAPES_OF_FLOAT32 = StateShapes(chunk=32, scan_columns=32, lru_chunk=32)


class CudaStates:
    """The states of all slots, in memory from the start: captured graphs hold their addresses."""

    def __init__(
        self, layout: Mapping[tuple[int, str], StateSpec], num_slots: int, dtype: torch.dtype, device: Device
    ) -> None:
        self.progress = RingProgress(num_slots if layout else 0)
        self._rings = {
            key: torch.zeros(
                (num_slots, STATE_RING, *spec.shape), dtype=torch.float32 if spec.dtype == "float32" else dtype,
                device=device.torch,
            )
            for key, spec in layout.items()
        }  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(ring.nbytes for ring in self._rings.values())

    def ring(self, spec: StateSpec) -> Tensor:
        """Return the states (slots, ring, …) of an operation."""
        return self._rings[spec.key]

    def advance(self, inputs: StepInputs) -> None:
        """Record a step. Raise RuntimeError if a row does not continue where a state of its slot is."""
        if self._rings:
            self.progress.advance(inputs)

    def clear(self) -> None:
        """Drop the states of the warm-up's slot."""
        if self._rings:
            self.progress.clear(0)
        for ring in self._rings.values():
            ring[0].zero_()


class _Chunks(NamedTuple):
    """Scratch of the delta rule in chunks, shared by all layers: see `ready_chunks`."""

    w: Tensor
    u: Tensor
    queries: Tensor
    keys: Tensor
    scores: Tensor
    last: Tensor


class StateLowering:
    """Lowers operations with a state. `weights`: those on the device. `shapes`: None for those of the dtype."""

    def __init__(
        self,
        memory: Memory,
        weights: Mapping[Weight, Tensor],
        states: CudaStates,
        shapes: StateShapes | None = None,
    ) -> None:
        self._memory, self._weights, self._states = memory, weights, states
        self._shapes = shapes or (SHAPES if memory.dtype.itemsize == 2 else SHAPES_OF_FLOAT32)
        found = [op for op in memory.program.ops if op.state() is not None]
        self.tile_tokens = {RUN} if found else set[int]()
        rules = [op for op in found if isinstance(op, DeltaRule)]
        scans = [op for op in found if isinstance(op, StateSpace) and not op.a_log.columns]
        self._scratch = self._chunks(rules) if rules else None
        self._scan_scratch = self._parts_of_scans(scans) if scans else None
        if rules or scans:
            self.tile_tokens.add(self._shapes.chunk)
        self._gates = {op.layer: self._gates_of(op) for op in found if isinstance(op, RgLru)}

    @property
    def nbytes(self) -> int:
        """Bytes of scratch and of copies of weights."""
        gates = (part for pair in self._gates.values() for part in pair)
        held = [*(self._scratch or ()), *(self._scan_scratch or ()), *gates]
        return sum(tensor.nbytes for tensor in held)

    def by_kind(self) -> dict[type[Op], Callable[[Any], Run]]:
        """Return the function that lowers each kind."""
        return {CausalConv: self._conv, StateSpace: self._scan, DeltaRule: self._delta, RgLru: self._lru}

    def _optional(self, weight: Weight | None, instead: Tensor) -> Tensor:
        return instead if weight is None else self._weights[weight]

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
        some, of_singles = max(1, min(power(width), shapes.tile // block)), Site(scan.scan_heads)
        of_runs = self._scan_runs(op, tensors, options)

        def run(n: Sizes) -> None:
            if singles := singles_of(n):
                of_singles(
                    (singles, heads, triton.cdiv(width, some)),
                    *tensors, *rows_of(n), *numbers, HEADS=heads, GROUPS=op.groups, P=width, N=columns, BP=some,
                    BN=power(columns), **options, SOME=n.singles is not None, RUNS=False, STAGES=1,
                    num_warps=shapes.tile_warps,
                )  # fmt: skip
            if runs_of(n):
                of_runs(n)

        return run

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
        together = shapes.channel_chunk > 1
        of_singles, of_runs = Site(scan.scan_columns), Site(scan.scan_column_chunks if together else scan.scan_columns)

        def run(n: Sizes) -> None:
            if singles := singles_of(n):
                of_singles(
                    (singles, triton.cdiv(width, 64)),
                    *tensors, *rows_of(n), *numbers, **sizes, BC=64, BN=block, **options,
                    SOME=n.singles is not None, RUNS=False, STAGES=1, num_warps=2,
                )  # fmt: skip
            runs = runs_of(n)
            if runs and together:
                of_runs(
                    (runs, triton.cdiv(width, shapes.channels)),
                    *tensors, n.tiles[RUN], *numbers, **sizes, L=shapes.channel_chunk, BC=shapes.channels, BN=block,
                    **options, STAGES=shapes.channel_stages, num_warps=1,
                )  # fmt: skip
            elif runs:
                of_runs(
                    (runs, triton.cdiv(width, shapes.channels)),
                    *tensors, n.pairs, n.pairs, n.tiles[RUN], *numbers, **sizes, BC=shapes.channels, BN=block,
                    **options, SOME=False, RUNS=True, STAGES=shapes.channel_stages, num_warps=1,
                )  # fmt: skip

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
        scores, last = max(h for h, _, _ in shapes) * chunk, max(op.a.width for op in rules)

        def made(rows: int, width: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(rows * width, dtype=kind, device=device)

        return _Chunks(
            made(tokens, keys), made(tokens, values), made(tokens, keys), made(tokens, keys), made(tokens, scores),
            made(chunks, last, torch.float32),
        )  # fmt: skip

    def _delta(self, op: DeltaRule) -> Run:
        assert self._scratch is not None
        heads, columns, width = op.state().shape
        values = [self._memory.value(v) for v in (op.q, op.k, op.v, op.a, op.b)]
        inputs = *values, self._weights[op.a_log], self._weights[op.dt_bias]
        numbers = *(v.stride(0) for v in values), op.rate, columns**-0.5
        ends = self._states.ring(op.state()), self._memory.value(op.out)
        each = op.a.width != heads
        sizes = {"HEADS": heads, "SHARED": heads // (op.k.width // columns), "N": columns, "P": width}
        own = {name: sizes[name] for name in ("HEADS", "N", "P")}
        block, shapes = max(16, power(columns)), self._shapes
        some = max(1, min(power(width), shapes.tile // block))
        of_singles, before, of_runs = Site(delta.correct_rows), Site(delta.ready_chunks), Site(delta.correct_chunks)
        unit, strides = in_units(*values)
        together, chunk, scratch = max(16, min(shapes.delta_columns, power(width))), shapes.chunk, self._scratch

        def run(n: Sizes) -> None:
            if singles := singles_of(n):
                of_singles(
                    (singles, heads, triton.cdiv(width, some)),
                    *inputs, *ends, *rows_of(n), *numbers, **sizes, BN=power(columns), BP=some, EACH=each,
                    SOME=n.singles is not None, RUNS=False, STAGES=1, num_warps=shapes.tile_warps,
                )  # fmt: skip
            if runs := runs_of(n):
                before(
                    (len(n.tiles[chunk]), heads),
                    *inputs, n.tiles[chunk], *scratch, *strides, *numbers[-2:], **sizes, L=chunk, BN=block,
                    BP=max(16, power(width)), UNIT=unit, EACH=each, num_warps=shapes.ready_warps,
                )  # fmt: skip
                of_runs(
                    (runs, heads, triton.cdiv(width, together)),
                    *scratch, *ends, n.tiles[RUN], **own, L=chunk, BN=block, BP=together, EACH=each,
                    STAGES=shapes.delta_stages, num_warps=shapes.delta_warps,
                )  # fmt: skip

        return run

    # ---- Griffin

    def _gates_of(self, op: RgLru) -> tuple[Tensor, Tensor]:
        """Return the matrices (2, heads, columns, columns) and biases (2, heads, columns) of both gates."""
        matrices = [torch.stack([self._weights[w] for w in ws]) for ws in (op.input_gate, op.recurrence_gate)]
        return torch.stack(matrices), torch.stack([self._weights[w] for w in (op.input_bias, op.recurrence_bias)])

    def _lru(self, op: RgLru) -> Run:
        x = self._memory.value(op.x)
        tensors = (
            x, *self._gates[op.layer], self._weights[op.a], self._states.ring(op.state()), self._memory.value(op.out)
        )  # fmt: skip
        heads, width = len(op.input_gate), op.x.width // len(op.input_gate)
        shapes, padded = self._shapes, max(16, power(width))
        sizes = {"HEADS": heads, "D": width, "BK": min(64, padded), "BC": min(shapes.lru_columns, padded)}
        columns = triton.cdiv(width, sizes["BC"])
        of_singles, of_runs = Site(lru.lru_single), Site(lru.lru_runs)

        def run(n: Sizes) -> None:
            if singles := singles_of(n):
                pairs, rows, _ = rows_of(n)
                of_singles(
                    (triton.cdiv(singles, 16), heads, columns),
                    *tensors, pairs, rows, x.stride(0), singles, **sizes, BM=16, SOME=n.singles is not None,
                    num_warps=4,
                )  # fmt: skip
            if runs := runs_of(n):
                of_runs(
                    (runs, heads, columns),
                    *tensors, n.tiles[RUN], x.stride(0), **sizes, L=shapes.lru_chunk, STAGES=2, num_warps=4,
                )  # fmt: skip

        return run


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
