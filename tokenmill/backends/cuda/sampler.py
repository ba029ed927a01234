"""Sampling on the device, and copies of the tokens to pinned memory. The host does not wait.

Greedy rows and rows with a temperature alone cost one launch, which a CUDA graph may hold. Masks, biases and penalties
first copy the logits to float32 scores; filters choose in two launches; log-probabilities cost one launch more and
torch's top-k. Only a watermark makes the host wait: the token before seeds a permutation that a generator on the host
draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.base import Masks, StepInputs
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.kernels.choose import choose
from tokenmill.backends.cuda.kernels.filtered import choose_filtered, summarize
from tokenmill.backends.cuda.kernels.masks import forbid
from tokenmill.backends.cuda.kernels.penalties import count_tokens, penalize
from tokenmill.backends.cuda.kernels.report import report
from tokenmill.backends.cuda.shapes import CLASSES, ChooseShape, choose_shape, power
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.backends.sampling import FILTERS, active_steps, num_listed
from tokenmill.backends.torch.sampling import Logprobs, green_ids

_SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Low bits that are the same in all logits of a dtype, as float32."""

GROUPS = 1024  # approximate number of groups of a row, which one program reads at once
GROUP_LOGITS = (16, 128)  # least and most logits of a group: one memory transaction, one vector of a warp
TILE_LOGITS = 8192  # logits that a program searches at a time
SUMMARY_LOGITS = 4096  # logits that a program summarizes
FILTER_WARPS, SUMMARY_WARPS, REPORT_WARPS = 16, 4, 16
TOKENS = 1024  # tokens of a sequence that a program counts at a time
MASKED = 2048  # ids that a program masks
MOST_COUNTING = 4096  # most programs that count tokens
REPORT_LOGITS = 8192  # logits of a row that a program reports at a time
LEAST_LOGITS, MOST_LOGITS = 256, 4096  # least and most logits of a program that chooses in one round
ROUND_LOGITS = 2048  # logits of one of several rounds. More would leave registers for two programs only.
_FEW = 8  # rows that ask for log-probabilities are copied if they are at most one in so many
_MOST_LISTED = 64  # most likeliest ids of a row; TGI and OpenAI allow fewer


@dataclass(frozen=True, slots=True)
class Needs:
    """Rules that apply to the R rows of a step, on the host."""

    p: NDArray[np.void]  # (R,) parameters
    watermarked: NDArray[np.int64]  # rows
    biased: bool = False  # any row is; likewise below
    penalized: bool = False
    filtered: bool = False

    @property
    def changes(self) -> bool:
        """True if a rule may change a token that logits and temperature alone would choose."""
        return self.biased or self.penalized or self.filtered or len(self.watermarked) > 0

    @classmethod
    def of(cls, p: NDArray[np.void], full: bool) -> Needs:
        """Return the needs of rows with parameters `p` (R,). `full`: the tail of the step is."""
        if not full:
            return cls(p, np.zeros(0, np.int64))
        active = active_steps(p)
        needed = {name: bool(rows.any()) for name, rows in active.items()}
        filtered = any(needed[name] for name in FILTERS)
        return cls(p, np.flatnonzero(active["watermark"]), needed["biases"], needed["penalties"], filtered)


class Sampler:
    """Chooses the next token of the rows of `logits` (R, V). The constructor takes all lasting memory.

    `batch_invariant`: a row's token depends on its logits and its sequence only. Otherwise the order in which masses
    are added depends on whether another row of the step has a bias or a penalty, and rounding may move a filter's edge.
    """

    def __init__(self, logits: Tensor, slots: CudaSlots, device: Device, batch_invariant: bool = False) -> None:
        self._logits, self._slots, self._device, self._invariant = logits, slots, device, batch_invariant
        rows, vocab = self._rows, self._vocab = logits.shape
        self._words = -(-vocab // 32)  # of a row of a mask
        least, most = GROUP_LOGITS
        self._group = max(least, min(most, power(-(-vocab // GROUPS))))
        self._groups = -(-vocab // self._group)
        width = power(self._groups)

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device.torch)

        parts = max(min(rows, c) * _shape(min(rows, c), vocab).chunks for c in CLASSES)
        self._best, self._best_ids = empty(parts, dtype=torch.float32), empty(parts)
        self._done = torch.zeros(rows, dtype=torch.int32, device=device.torch)  # programs of a row; zero between steps
        self._chosen, self._kept, self._lists = empty(rows).zero_(), empty(rows, 2), empty(rows, width)
        self._maxima, self._sums = (empty(rows, self._groups, dtype=torch.float32) for _ in range(2))
        self._logprob, self._total = (empty(rows, dtype=torch.float32) for _ in range(2))
        self._scores = empty(rows, vocab, dtype=torch.float32)
        self._counts = empty(rows, vocab).zero_()  # zero between steps
        self._all = torch.arange(rows, dtype=torch.int32, device=device.torch)

    @property
    def chosen(self) -> Tensor:
        """Ids that were chosen last, (rows,) int32."""
        return self._chosen

    @property
    def nbytes(self) -> int:
        """Bytes of the sampler's lasting memory."""
        return sum(held.nbytes for held in vars(self).values() if isinstance(held, Tensor)) - self._logits.nbytes

    @property
    def step_bytes(self) -> int:
        """Bytes of a step's temporary memory: torch's top-k, copies of few rows for it and its results, a watermark's
        green ids, and masks."""
        row = 4 * self._vocab
        masks = 3 * self._rows * -(-self._vocab // 8)
        return (-(-self._rows // _FEW) + -(-self._rows // 8) + 8) * row + self._rows * _MOST_LISTED * 48 + masks

    def launch(self, sizes: Sizes) -> None:
        """Choose for all rows of `sizes`, by logits and temperature alone: one launch, which a graph may hold."""
        self._choose(self._logits, sizes, sizes.sampling)

    def sample(
        self, inputs: StepInputs, sizes: Sizes, chosen: bool = False, masks: Masks | None = None
    ) -> tuple[Tensor, Logprobs | None]:
        """Sample a step's rows: write the tokens to their slots, and return them and their log-probabilities.

        Both are in pinned memory, complete when a later mark has passed. `chosen`: `launch` was called for the step;
        its tokens are overwritten where they are not the right ones.
        """
        rows = len(inputs.samples)
        needs = Needs.of(self._slots.parameters.rows[inputs.slots[inputs.samples]], inputs.tail == "full")
        source = self._processed(inputs, sizes, needs, masks)
        if needs.filtered:
            self._choose_filtered(source, sizes, rows)
        elif not chosen or source is not self._logits:
            self._choose(source, sizes, rows)
        logprobs = None if inputs.logprobs < 0 else self._logprobs(source, sizes, needs, inputs.logprobs)
        return self._device.fetch(self._chosen[:rows]), logprobs

    def warm_up(self, sizes: Sizes) -> None:
        """Launch the kernels that decode steps of this size may need. Only the rows of `sizes` are changed."""
        rows = sizes.sampling
        scores = self._scores[:rows].copy_(self._logits[:rows])
        self._forbid(Masks(np.zeros(1, np.int32), np.full((1, self._words), 0xFFFFFFFF, np.uint32)))
        self._count(sizes, rows, 1, penalized=True)
        asked = np.zeros(1, np.int64)
        for source in (self._logits, self._scores):
            self._choose(source, sizes, rows)
            self._choose_filtered(source, sizes, rows)
            for filtered in (False, True):
                self._report(source, sizes, asked, filtered)
        scores.topk(min(_MOST_LISTED, self._vocab))

    def warm_up_some(self, step: Tensor) -> None:
        """Launch the kernels that other steps may need, on the padding slot. `step`: an int buffer to overwrite."""
        for most in {min(most, len(self._chosen)) for most in CLASSES}:
            step[: 2 * most : 2], step[1 : 2 * most : 2] = self._slots.padding, 0
            rows = torch.zeros(most, dtype=torch.int32, device=self._device.torch)
            self.warm_up(Sizes(most, most, step[: 2 * most], rows))

    # ---- scores ----

    def _processed(self, inputs: StepInputs, sizes: Sizes, needs: Needs, masks: Masks | None) -> Tensor:
        """Return the logits, or float32 scores if a row has a mask, a watermark, a bias or a penalty."""
        rows, watermarked = len(needs.p), len(needs.watermarked) > 0
        biased, penalized = needs.biased, needs.penalized
        masked = masks is not None and len(masks.rows) > 0
        if not (masked or watermarked or biased or penalized or (self._invariant and needs.filtered)):
            return self._logits
        self._scores[:rows].copy_(self._logits[:rows])
        if masks is not None and masked:
            self._forbid(masks)
        ends = (inputs.starts + inputs.counts)[inputs.samples]
        if watermarked:
            self._watermark(inputs.slots[inputs.samples], ends - 1, needs)
        if biased or penalized:
            self._count(sizes, rows, int(ends.max()) if penalized else 1, penalized)
        return self._scores

    def _forbid(self, masks: Masks) -> None:
        """Set the scores that a mask does not allow to minus infinity."""
        rows, bits = self._device.send(masks.rows), self._device.send(masks.bits.view(np.int32))
        forbid[(len(masks.rows), triton.cdiv(self._vocab, MASKED))](
            self._scores, rows, bits, VOCAB=self._vocab, WORDS=self._words, BLOCK=MASKED
        )

    def _watermark(self, slots: NDArray[np.int32], lasts: NDArray[np.int32], needs: Needs) -> None:
        """Add to the scores of green ids. Wait for the rows' last tokens, which are at `lasts` of `slots`."""
        rows, p = needs.watermarked, needs.p[needs.watermarked]
        previous = self._slots.tokens[self._device.send(slots[rows]), self._device.send(lasts[rows])].tolist()
        for row, before, gamma, delta in zip(
            rows.tolist(), previous, p["watermark_gamma"].tolist(), p["watermark_delta"].tolist(), strict=True
        ):
            green = green_ids(before, gamma, self._vocab).numpy()
            self._scores[row][self._device.send(green)] += delta

    def _count(self, sizes: Sizes, rows: int, longest: int, penalized: bool) -> None:
        """Apply biases and penalties. `longest`: tokens of the longest sequence."""
        slots, places = self._slots, (sizes.pairs, self._samples(sizes), self._slots.sampling)
        grid = rows, max(1, min(triton.cdiv(longest, TOKENS), MOST_COUNTING // rows))
        count_tokens[grid](
            *places, slots.biases, slots.tokens, self._counts, self._scores, slots.sampling.stride(0),
            slots.biases.stride(0), slots.tokens.stride(0), VOCAB=self._vocab, BLOCK=TOKENS, SKIPS=slots.skips_inputs,
        )  # fmt: skip
        if penalized:
            penalize[grid](
                *places, slots.tokens, self._counts, self._scores, slots.sampling.stride(0), slots.tokens.stride(0),
                VOCAB=self._vocab, BLOCK=TOKENS, SKIPS=slots.skips_inputs, enable_fp_fusion=False,
            )  # fmt: skip

    # ---- tokens ----

    def _choose(self, source: Tensor, sizes: Sizes, rows: int) -> None:
        shape, slots = _shape(rows, self._vocab), self._slots
        choose[(rows, shape.chunks)](
            source, sizes.pairs, sizes.pairs if sizes.samples is None else sizes.samples, slots.sampling, slots.tokens,
            self._chosen, self._best, self._best_ids, self._done, slots.tokens.stride(0), slots.sampling.stride(0),
            VOCAB=self._vocab, CHUNKS=shape.chunks, BLOCK=shape.block, ROUNDS=shape.rounds,
            SOME=sizes.samples is not None, num_warps=shape.warps, enable_fp_fusion=False,
        )  # fmt: skip

    def _choose_filtered(self, source: Tensor, sizes: Sizes, rows: int) -> None:
        slots, width = self._slots, self._lists.shape[1]
        places = (source, sizes.pairs, self._samples(sizes), slots.sampling)
        tile = min(SUMMARY_LOGITS // self._group, width)
        summarize[(rows, triton.cdiv(self._groups, tile))](
            *places, self._maxima, self._sums, slots.sampling.stride(0), VOCAB=self._vocab, GROUPS=self._groups,
            GROUP=self._group, TILE=tile, num_warps=SUMMARY_WARPS,
        )  # fmt: skip
        choose_filtered[(rows,)](
            *places, slots.tokens, self._chosen, self._kept, self._maxima, self._sums, self._lists,
            slots.tokens.stride(0), slots.sampling.stride(0), VOCAB=self._vocab, SHIFT=_SHIFTS[source.dtype],
            GROUPS=self._groups, WIDTH=width, GROUP=self._group, TILE=min(TILE_LOGITS // self._group, width),
            num_warps=FILTER_WARPS, enable_fp_fusion=False,
        )  # fmt: skip

    def _samples(self, sizes: Sizes) -> Tensor:
        """Return each sampling row's index among the step's tokens."""
        return self._all if sizes.samples is None else sizes.samples

    # ---- log-probabilities ----

    def _logprobs(self, source: Tensor, sizes: Sizes, needs: Needs, most: int) -> Logprobs:
        """Return log-probabilities in pinned memory. May overwrite `source`. `most`: the most ids that a row lists."""
        rows, wanted = len(needs.p), np.minimum(needs.p["logprobs"], most).astype(np.int32)
        ties = needs.p["raw_logprobs"] == 0
        asked = np.flatnonzero(wanted >= 0)
        places = self._report(source, sizes, asked, needs.filtered)
        number = num_listed(wanted, ties, self._vocab)
        if len(asked) * _FEW <= rows:
            ids = torch.zeros(rows, number, dtype=torch.int64, device=self._device.torch)
            top = torch.zeros(rows, number, device=self._device.torch)
            values, found = self._scores.index_select(0, places).topk(number)
            top.index_copy_(0, places, values)
            ids.index_copy_(0, places, found)
        else:
            top, ids = self._scores[:rows].topk(number)
        top = top - self._total[:rows, None]
        fetch = self._device.fetch
        return Logprobs(fetch(self._logprob[:rows]), fetch(ids), fetch(top), wanted, ties)

    def _report(self, source: Tensor, sizes: Sizes, asked: NDArray[np.int64], filtered: bool) -> Tensor:
        """Compute scores and totals of the rows `asked`, and return these rows on the device."""
        places = self._device.send(asked)
        report[(len(asked),)](
            places, self._logits, source, sizes.pairs, self._samples(sizes), self._slots.sampling, self._kept,
            self._chosen, self._scores, self._logprob, self._total, self._slots.sampling.stride(0), VOCAB=self._vocab,
            BLOCK=min(power(self._vocab), REPORT_LOGITS), FILTERED=filtered, num_warps=REPORT_WARPS,
        )  # fmt: skip
        return places


def _shape(rows: int, vocab: int) -> ChooseShape:
    """Return the sizes of choosing tokens without filters."""
    shape = choose_shape(rows, vocab)
    chunks = max(1, min(shape.chunks, power(vocab) // LEAST_LOGITS))
    block = power(-(-vocab // chunks))
    if block > MOST_LOGITS:
        block = ROUND_LOGITS
    return shape._replace(chunks=chunks, block=block, rounds=-(-vocab // (chunks * block)))
