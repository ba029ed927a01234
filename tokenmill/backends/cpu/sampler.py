"""Sampling as the host sees it: what the kernel `sample` (`sampling.py`) is told before a step, and what it leaves.

The kernel does all that `backends/sampling.py` says, row by row on all threads, and writes each token behind its
sequence, so that the next step finds it. Needs no numba.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.base import Masks, StepInputs
from tokenmill.backends.cpu import sampling_layout as w
from tokenmill.backends.cpu.scratch import zeros
from tokenmill.backends.sampling import MOST_TIES, Parameters
from tokenmill.wire.messages import TokenDetails


class Sampler:
    """What the kernel needs beside a step's context: `address` is for the context's word `layout.SAMPLING`.

    `tokens` (slots, positions) int32, by slot; the kernel reads what came before and writes what it chooses.
    Before a step whose last operation is the kernel: `begin`, or `begin_prompt` to learn only how likely given tokens
    are; after it, `details`.
    """

    def __init__(self, tokens: NDArray[np.int32], parameters: Parameters, vocab_size: int, threads: int) -> None:
        self._tokens, self._parameters = tokens, parameters
        self._words = zeros((w.WORDS,), np.int64)
        self._scratch = _scratch(vocab_size, tokens.shape[1], threads)
        self._held: list[NDArray[np.generic]] = []  # what the words point to, for this step
        self._most = -1
        self._write(
            {
                w.PARAMETER_ROWS: parameters.rows.ctypes.data,
                w.TOKENS: tokens.ctypes.data,
                w.TOKENS_STRIDE: tokens.strides[0],
                w.SCRATCH: self._scratch.ctypes.data,
                w.SCRATCH_SIZE: self._scratch.strides[0],
            }
        )

    @property
    def address(self) -> int:
        """Of the kernel's words; never changes."""
        return int(self._words.ctypes.data)

    @property
    def nbytes(self) -> int:
        """Of scratch, if all of it is touched."""
        return self._scratch.nbytes

    def begin(self, inputs: StepInputs, masks: Masks | None = None) -> None:
        """The step chooses tokens for the rows `inputs.samples`, after the slots took in what is new."""
        p = self._parameters
        self._held = []
        if masks is not None:
            bits, of_rows = np.ascontiguousarray(masks.bits), np.zeros(len(inputs.samples), np.int64)
            of_rows[masks.rows] = bits.ctypes.data + bits.strides[0] * np.arange(len(masks.rows))
            self._held = [bits, of_rows]
        self._write(
            {
                w.MODE: w.SAMPLE,
                w.BIAS_IDS: p.bias_ids.ctypes.data,
                w.BIAS_VALUES: p.bias_values.ctypes.data,
                w.BIAS_UNTIL: p.bias_until.ctypes.data,
                w.BIAS_STRIDE: p.bias_ids.strides[0],
                w.MASKS: self._held[1].ctypes.data if self._held else 0,
            }
        )
        self._list(len(inputs.samples), inputs.logprobs + MOST_TIES if inputs.logprobs > 0 else inputs.logprobs)

    def begin_prompt(self, targets: NDArray[np.int64], wanted: NDArray[np.integer]) -> None:
        """The step's rows (P,) say how likely `targets` are, and list the `wanted` likeliest ids; -1: nothing."""
        targets, counts = np.ascontiguousarray(targets, np.int64), wanted.astype(np.int64)
        self._write({w.MODE: w.SCORE, w.TARGETS: targets.ctypes.data, w.WANTED: counts.ctypes.data})
        self._list(len(targets), max(int(counts.max(initial=0)), 0))
        self._held = [targets, counts]

    def details(self) -> list[TokenDetails | None] | None:
        """Of the step's rows, in their order; None if nobody asked."""
        if self._most < 0:
            return None
        made: list[TokenDetails | None] = []
        columns = (a.tolist() for a in (self._listed, self._chosen, self._ids, self._logprobs))
        for listed, chosen, ids, logprobs in zip(*columns, strict=True):
            made.append(None if listed < 0 else TokenDetails(chosen, tuple(ids[:listed]), tuple(logprobs[:listed])))
        return made

    def _list(self, rows: int, most: int) -> None:
        """Room for what `rows` rows list."""
        self._most = most
        self._write({w.MOST: most})
        if most < 0:
            return
        self._listed = np.full(rows, -1, np.int32)
        self._chosen = np.zeros(rows, np.float32)
        self._ids = np.zeros((rows, most), np.int32)
        self._logprobs = np.zeros((rows, most), np.float32)
        self._write(
            {
                w.LISTED: self._listed.ctypes.data,
                w.CHOSEN: self._chosen.ctypes.data,
                w.TOP_IDS: self._ids.ctypes.data,
                w.TOP_LOGPROBS: self._logprobs.ctypes.data,
            }
        )

    def _write(self, words: dict[int, int]) -> None:
        for offset, value in words.items():
            self._words[offset // 8] = value


def _scratch(vocab_size: int, max_tokens: int, threads: int) -> NDArray[np.uint8]:
    """(threads, bytes): each thread's begins with the addresses of its parts."""
    row = -(-vocab_size // 64) * 256  # bytes of a number for each id
    sizes = dict.fromkeys(range(0, 8 * w.PARTS, 8), row)
    sizes |= {w.TOUCHED: -(-min(max_tokens, vocab_size) // 16) * 64, w.HISTOGRAM: 8 * w.BUCKETS}
    sizes |= dict.fromkeys((w.MASSES, w.DEPTHS, w.FIRST_DEPTHS, w.KEPT), 64)
    sizes[w.TWISTER] = w.TWISTER_BYTES
    sizes[w.MAXIMA] = -(-row // 4096) * 64
    scratch: NDArray[np.uint8] = zeros((threads, 128 + sum(sizes.values())))
    for own in scratch:
        at = own.ctypes.data + 128
        for part, size in sizes.items():
            own[part : part + 8].view(np.int64)[0] = at
            if part == w.FIRST_DEPTHS:
                depths = at - own.ctypes.data
                own[depths : depths + 32].view(np.float32)[:] = w.FIRST_DEPTHS_OF_ALL
            at += size
    return scratch
