"""The host side of sampling: inputs and outputs of the kernel `sample` (`sampling.py`). Needs no numba.

The kernel implements `backends/sampling.py`, row by row on all threads. It appends each token to its sequence, where
the next step reads it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.base import Masks, StepInputs
from tokenmill.backends.cpu import sampling_layout
from tokenmill.backends.cpu.scratch import zeros
from tokenmill.backends.sampling import MOST_TIES, Parameters
from tokenmill.wire.messages import TokenDetails


class Sampler:
    """The words and scratch of the sampling kernel. `address` is for the word `layout.SAMPLING` of the context.

    `tokens` (slots, positions) int32: token ids by slot; the kernel reads earlier ids and writes sampled ones.

    Call `begin` before a step that samples, or `begin_prompt` before one that computes only log-probabilities of given
    tokens. Call `details` after the step.
    """

    def __init__(self, tokens: NDArray[np.int32], parameters: Parameters, vocab_size: int, threads: int) -> None:
        self._tokens, self._parameters = tokens, parameters
        self._words = zeros((sampling_layout.WORDS,), np.int64)
        self._scratch = _scratch(vocab_size, tokens.shape[1], threads)
        self._referenced: list[NDArray[np.generic]] = []  # keeps the arrays of the current step alive
        self._max_listed = -1
        self._write(
            {
                sampling_layout.PARAMETER_ROWS: parameters.rows.ctypes.data,
                sampling_layout.TOKENS: tokens.ctypes.data,
                sampling_layout.TOKENS_STRIDE: tokens.strides[0],
                sampling_layout.SCRATCH: self._scratch.ctypes.data,
                sampling_layout.SCRATCH_SIZE: self._scratch.strides[0],
            }
        )

    def skip_inputs(self) -> None:
        """Let only the last token of a prompt count in penalties. Call before the first step."""
        self._write({sampling_layout.SKIPS_INPUTS: 1})

    @property
    def address(self) -> int:
        """The address of the kernel's words, which never changes."""
        return int(self._words.ctypes.data)

    @property
    def nbytes(self) -> int:
        """Bytes of scratch memory, if all of it is in use."""
        return self._scratch.nbytes

    def begin(self, inputs: StepInputs, masks: Masks | None = None) -> None:
        """Prepare sampling for the rows `inputs.samples`. Call after `Slots.apply`."""
        p = self._parameters
        self._referenced = []
        if masks is not None:
            bits, of_rows = np.ascontiguousarray(masks.bits), np.zeros(len(inputs.samples), np.int64)
            of_rows[masks.rows] = bits.ctypes.data + bits.strides[0] * np.arange(len(masks.rows))
            self._referenced = [bits, of_rows]
        self._write(
            {
                sampling_layout.MODE: sampling_layout.SAMPLE,
                sampling_layout.BIAS_IDS: p.bias_ids.ctypes.data,
                sampling_layout.BIAS_VALUES: p.bias_values.ctypes.data,
                sampling_layout.BIAS_UNTIL: p.bias_until.ctypes.data,
                sampling_layout.BIAS_STRIDE: p.bias_ids.strides[0],
                sampling_layout.MASKS: self._referenced[1].ctypes.data if self._referenced else 0,
            }
        )
        self._allocate_lists(
            len(inputs.samples), inputs.logprobs + MOST_TIES if inputs.logprobs > 0 else inputs.logprobs
        )

    def begin_prompt(self, targets: NDArray[np.int64], wanted: NDArray[np.integer]) -> None:
        """Prepare log-probabilities of the P rows of a step.

        `targets` (P,): token ids. `wanted` (P,): number of likeliest ids to list; -1: no log-probabilities of this row.
        """
        targets, counts = np.ascontiguousarray(targets, np.int64), wanted.astype(np.int64)
        self._write(
            {
                sampling_layout.MODE: sampling_layout.SCORE,
                sampling_layout.TARGETS: targets.ctypes.data,
                sampling_layout.WANTED: counts.ctypes.data,
            }
        )
        self._allocate_lists(len(targets), max(int(counts.max(initial=0)), 0))
        self._referenced = [targets, counts]

    def details(self) -> list[TokenDetails | None] | None:
        """Return the log-probabilities of the step's rows, in order; None if no row requests them."""
        if self._max_listed < 0:
            return None
        details: list[TokenDetails | None] = []
        columns = (a.tolist() for a in (self._listed, self._chosen, self._ids, self._logprobs))
        for listed, chosen, ids, logprobs in zip(*columns, strict=True):
            details.append(None if listed < 0 else TokenDetails(chosen, tuple(ids[:listed]), tuple(logprobs[:listed])))
        return details

    def _allocate_lists(self, rows: int, max_listed: int) -> None:
        """Allocate the outputs of `rows` rows; none if `max_listed` is negative."""
        self._max_listed = max_listed
        self._write({sampling_layout.MAX_LISTED: max_listed})
        if max_listed < 0:
            return
        self._listed = np.full(rows, -1, np.int32)
        self._chosen = np.zeros(rows, np.float32)
        self._ids = np.zeros((rows, max_listed), np.int32)
        self._logprobs = np.zeros((rows, max_listed), np.float32)
        self._write(
            {
                sampling_layout.LISTED: self._listed.ctypes.data,
                sampling_layout.CHOSEN: self._chosen.ctypes.data,
                sampling_layout.TOP_IDS: self._ids.ctypes.data,
                sampling_layout.TOP_LOGPROBS: self._logprobs.ctypes.data,
            }
        )

    def _write(self, words: dict[int, int]) -> None:
        for offset, value in words.items():
            self._words[offset // 8] = value


def _scratch(vocab_size: int, max_tokens: int, threads: int) -> NDArray[np.uint8]:
    """Allocate scratch (threads, bytes). A thread's scratch begins with the addresses of its parts."""
    row = -(-vocab_size // 64) * 256  # bytes of a number for each id
    sizes = dict.fromkeys(range(0, 8 * sampling_layout.PARTS, 8), row)
    sizes |= {
        sampling_layout.TOUCHED: -(-min(max_tokens, vocab_size) // 16) * 64,
        sampling_layout.HISTOGRAM: 8 * sampling_layout.BUCKETS,
    }
    sizes |= dict.fromkeys(
        (sampling_layout.MASSES, sampling_layout.DEPTHS, sampling_layout.FIRST_DEPTHS, sampling_layout.KEPT), 64
    )
    sizes[sampling_layout.TWISTER] = sampling_layout.TWISTER_BYTES
    sizes[sampling_layout.MAXIMA] = -(-row // 4096) * 64
    scratch: NDArray[np.uint8] = zeros((threads, 128 + sum(sizes.values())))
    for own in scratch:
        at = own.ctypes.data + 128
        for part, size in sizes.items():
            own[part : part + 8].view(np.int64)[0] = at
            if part == sampling_layout.FIRST_DEPTHS:
                depths = at - own.ctypes.data
                own[depths : depths + 32].view(np.float32)[:] = sampling_layout.INITIAL_DEPTHS
            at += size
    return scratch
