"""Attention of runs of tokens by flashinfer's kernels instead of this backend's own, at the user's choice.

flashinfer compiles a kernel with nvcc when it is first planned, once on a machine, in a minute or two. `load` does this
before a server is ready. Lengths are on the host, block tables on the device: page numbers are gathered on the device,
so planning a step does not wait.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from subprocess import SubprocessError
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.cuda.device import Mark
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.program import ops
from tokenmill.wire.messages import Progress

Ints = NDArray[np.int32]

_TILE = 128  # the most queries of a tile, which bounds the partial results of a split run
_LEAST_BYTES = 1 << 20
_HOPPER = 9
_FAILURES = (
    AssertionError, AttributeError, ImportError, OSError, RuntimeError, SubprocessError, TypeError, ValueError,
)  # fmt: skip
"""Errors that a foreign package may raise while it looks for a compiler, compiles, and loads the result."""

_log = logging.getLogger(__name__)


class Kind(NamedTuple):
    """Layers that share a plan."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float

    @classmethod
    def of(cls, op: ops.Attention) -> Kind:
        """Return the kind of a layer."""
        heads, kv_heads = op.q.width // op.head_dim, op.k.width // op.head_dim
        return cls(heads, kv_heads, op.head_dim, op.scale, op.window, op.softcap)


def load(
    memory: Memory,
    slots: CudaSlots,
    scales: dict[int, tuple[float, float]] | None = None,
    report: Callable[[Progress], None] | None = None,
) -> FlashInfer | None:
    """Return flashinfer with its kernels compiled; None, with the cure in the log, if that fails. Blocks meanwhile.

    `scales`: see `FlashInfer`.
    """
    _log.info("Loading flashinfer's kernels; the first time on a machine nvcc compiles them, for a minute or two.")
    try:
        made = FlashInfer(importlib.import_module("flashinfer"), memory, slots, scales)
        for done in made.compile():
            if report is not None:
                report(Progress("compile", done, made.num_kinds, unit="items", detail="flashinfer"))
    except _FAILURES as error:
        _log.debug("flashinfer failed:", exc_info=True)
        _log.warning(
            "flashinfer cannot be used here (%s: %s): Triton's kernels attend. It needs `nvcc` and `ninja` on PATH, or "
            "the package flashinfer-jit-cache; or leave `--attention` out.",
            type(error).__name__, str(error).partition("\n")[0],
        )  # fmt: skip
        return None
    return made


class FlashInfer:
    """Attention of the runs of a step: planned once, launched layer by layer. For one program and one device.

    `package`: flashinfer. `scales`: layer -> factors that a key and a value of the cache are multiplied by. Rotated
    queries (`Memory.queries`) and cached keys and values must have been written. Single tokens between two runs are
    computed too, with the same result as by the kernel for single tokens.
    """

    def __init__(
        self, package: Any, memory: Memory, slots: CudaSlots, scales: dict[int, tuple[float, float]] | None = None
    ) -> None:
        self._memory, self._slots, self._scales = memory, slots, scales or {}
        device = memory.device
        kinds = dict.fromkeys(Kind.of(op) for op in memory.program.ops if isinstance(op, ops.Attention))
        hopper = device.real and torch.cuda.get_device_capability(device.torch)[0] == _HOPPER
        whole = hopper and memory.cache_dtype == memory.dtype  # FlashAttention 3, which does not split keys
        self._work = torch.empty(self._work_bytes(kinds, whole), dtype=torch.uint8, device=device.torch)
        self._plans = {
            kind: package.BatchPrefillWithPagedKVCacheWrapper(self._work, "NHD", backend="fa3" if whole else "fa2")
            for kind in kinds
        }
        self._tokens = slice(0)
        self._copied: Mark = device.mark()

    @property
    def num_kinds(self) -> int:
        """Number of kinds of layers; each has kernels of its own."""
        return len(self._plans)

    def _work_bytes(self, kinds: dict[Kind, None], whole: bool) -> int:
        """Return the bytes of partial results: those of two tiles on each multiprocessor."""
        device = self._memory.device
        if whole or not device.real:
            return _LEAST_BYTES
        tiles = 2 * torch.cuda.get_device_properties(device.torch).multi_processor_count
        most = max((kind.heads // kind.kv_heads * (kind.head_dim + 1) for kind in kinds), default=0)
        return _LEAST_BYTES + most * tiles * _TILE * 4

    def plan(self, slots: Ints, starts: Ints, counts: Ints) -> None:
        """Plan a step of rows (S,) as in `StepInputs`, at least one of several tokens, before its layers are launched.

        Waits until the copies of the plan before have arrived, which they usually have. Not for captured graphs.
        """
        self._plan(self._plans, slots, starts, counts)

    def _plan(self, kinds: Iterable[Kind], slots: Ints, starts: Ints, counts: Ints) -> None:
        runs = np.flatnonzero(counts > 1)
        rows = slice(int(runs[0]), int(runs[-1]) + 1)
        begin = int(counts[: rows.start].sum())
        self._tokens = slice(begin, begin + int(counts[rows].sum()))
        size = self._memory.limits.block_size
        lengths = starts[rows] + counts[rows]
        pages = -(-lengths // size)
        queries, places = _bounds(counts[rows]), _bounds(pages)
        sent = [self._staged(array) for array in (queries, places, lengths - (pages - 1) * size)]
        numbers = self._page_numbers(slots[rows], pages, places)
        self._copied.wait()  # flashinfer stages all its plans in one pinned buffer.
        try:
            for kind in kinds:
                self._plans[kind].plan(
                    sent[0], sent[1], numbers, sent[2], kind.heads, kind.kv_heads, kind.head_dim, size, causal=True,
                    sm_scale=kind.scale, window_left=kind.window - 1, logits_soft_cap=kind.softcap,
                    q_data_type=self._memory.dtype, kv_data_type=self._memory.cache_dtype,
                )  # fmt: skip
        finally:  # The copies of earlier kinds are under way even if a later kind found no memory.
            self._copied = self._memory.device.mark()

    def _staged(self, array: Ints) -> Tensor:
        """Return a copy on the host, where flashinfer plans, pinned because flashinfer also copies it to the device."""
        host = torch.from_numpy(array.astype(np.int32))
        return host.pin_memory() if self._memory.device.real else host

    def _page_numbers(self, slots: Ints, pages: Ints, places: Ints) -> Tensor:
        """Return the first `pages` of each slot's table, slot after slot: (places[-1],) on the device."""
        device, tables, total = self._memory.device, self._slots.tables, int(places[-1])
        shifts = device.send(slots.astype(np.int64) * tables.stride(0) - places[:-1])
        at = torch.repeat_interleave(shifts, device.send(pages.astype(np.int64)), output_size=total)
        at += torch.arange(total, device=device.torch)
        return tables.view(-1).index_select(0, at)

    def lower(self, op: ops.Attention) -> Callable[[], None]:
        """Return the launch of one layer for the last planned step. The cache must have been allocated."""
        memory, kind = self._memory, Kind.of(op)
        plan, tokens = self._plans[kind], memory.rows["tokens"]
        queries = memory.queries.view(-1)[: tokens * op.q.width].view(tokens, kind.heads, kind.head_dim)
        out = memory.value(op.out).view(tokens, kind.heads, kind.head_dim)
        pages = -1, memory.limits.block_size, kind.kv_heads, kind.head_dim
        cache = tuple(part.view(pages) for part in memory.cache(op.layer))
        scales = dict(zip(("k_scale", "v_scale"), self._scales.get(op.layer, (None, None)), strict=True))

        def run() -> None:
            plan.run(queries[self._tokens], cache, out=out[self._tokens], enable_pdl=False, **scales)

        return run

    def compile(self) -> Iterator[int]:
        """Compile or load the kernels of each kind, and yield the number of kinds done after each."""
        padding = np.array([self._slots.padding], np.int32)
        for done, kind in enumerate(self._plans, 1):
            self._plan((kind,), padding, padding * 0, padding * 0 + 2)
            yield done


def _bounds(counts: Ints) -> Ints:
    """Return the begin of each of consecutive pieces, and the end of the last one."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
