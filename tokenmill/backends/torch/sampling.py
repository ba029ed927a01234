"""Logits to tokens and log-probabilities, for all rows of a step at once. What is computed: `backends/sampling.py`.

Rows that need a step of the work are picked out on the host, where the parameters are, so a batch pays for a filter
only on the rows that asked for it.

R rows that sample, V vocabulary, S some of the rows, L length of the longest of them, P prompt positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.base import Masks, StepInputs
from tokenmill.backends.sampling import MOST_TIES, WATERMARK_KEY, noise_keys
from tokenmill.backends.torch.slots import PromptPositions, Slots
from tokenmill.wire.messages import TokenDetails

_LIKELY = 256  # ids that top-p looks at first; rows that are not done by then are sorted whole


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of M rows: of each row's token, and of the n likeliest ids in its place, best first."""

    chosen: Tensor  # (M,)
    top_ids: Tensor  # (M, n)
    top: Tensor  # (M, n)
    wanted: NDArray[np.int32]  # (M,) how many of the n each row asked for; -1: nothing
    ties: NDArray[np.bool_]  # (M,) whether ids that tie with the last wanted one are listed too

    def details(self) -> list[TokenDetails | None]:
        """On the host, one a row; an id that a filter removed is not listed. Waits for the device."""
        chosen, ids, values = self.chosen.tolist(), self.top_ids.tolist(), self.top.tolist()
        made: list[TokenDetails | None] = []
        for row, (wanted, ties) in enumerate(zip(self.wanted.tolist(), self.ties.tolist(), strict=True)):
            if wanted < 0:
                made.append(None)
                continue
            best = sorted(zip((-value for value in values[row]), ids[row], strict=True))
            end = min(wanted, len(best))
            while ties and 0 < end < min(len(best), wanted + MOST_TIES) and best[end][0] == best[end - 1][0]:
                end += 1
            listed = [(i, -v) for v, i in best[:end] if v < torch.inf]
            made.append(TokenDetails(chosen[row], tuple(i for i, _ in listed), tuple(v for _, v in listed)))
        return made


@dataclass(frozen=True, slots=True)
class Sampled:
    """What sampling gives, still on the device."""

    token_ids: Tensor  # (R,) int64; -1: the row's logits were not finite
    logprobs: Logprobs | None = None  # of the R rows; None if nobody asked


@torch.inference_mode()
def sample(logits: Tensor, slots: Slots, inputs: StepInputs, masks: Masks | None = None) -> Sampled:
    """Choose the next token of every row of `inputs.samples` from `logits` (R, V), any float type.

    Writes nothing but, perhaps, `logits`, which it owns: `Slots.record` is the caller's, once all ranks know the ids.
    """
    logits = logits.float()
    best, token_ids = logits.max(-1)  # a NaN is larger than anything here
    finite = best.isfinite()
    rows = _Rows(slots, inputs)
    raw = rows.where((rows.all["logprobs"] >= 0) & rows.all["raw_logprobs"])
    masked, unprocessed = masks is not None and len(masks.rows) > 0, logits
    if inputs.logprobs >= 0 and len(raw) and (masked or inputs.tail != "greedy"):
        unprocessed = logits[raw.index]
    scores = logits
    if masks is not None and masked:
        scores = _masked(scores, masks)
        best, token_ids = scores.max(-1)
    if inputs.tail == "full":
        scores = _penalize(scores, rows)
        best, token_ids = scores.max(-1)
    finite &= best > -torch.inf
    if inputs.tail != "greedy":
        scores = _filter(_tempered(scores, rows), rows, full=inputs.tail == "full")
        token_ids = _choose(scores, token_ids, rows)
    token_ids = torch.where(finite, token_ids, -1)
    if inputs.logprobs < 0:
        return Sampled(token_ids)
    return Sampled(token_ids, _logprobs(scores, unprocessed, raw, token_ids, rows, inputs.logprobs))


@torch.inference_mode()
def prompt_details(
    logits: Tensor, positions: PromptPositions, slots: Slots, inputs: StepInputs
) -> dict[int, tuple[TokenDetails, ...]]:
    """Of the prompt tokens behind `positions`, by row of the step; `logits` (P, V) of these positions, as they are."""
    wanted = slots.parameters.rows["prompt_logprobs"][inputs.slots[positions.rows]]
    details: dict[int, list[TokenDetails]] = {}
    for part in range(0, len(wanted), 128):  # bounds the copies of (P, V)
        some = slice(part, part + 128)
        exact = np.zeros(len(wanted[some]), np.bool_)
        made = _log_softmax_of(logits[some].float(), positions.targets[some], wanted[some], exact).details()
        for row, detail in zip(positions.rows[some].tolist(), made, strict=True):
            if detail is not None:
                details.setdefault(row, []).append(detail)
    return {row: tuple(listed) for row, listed in details.items()}


def gumbel(keys: NDArray[np.uint32], vocab_size: int, device: torch.device) -> Tensor:
    """(S, V) noise under keys (S,); wrapping int32 arithmetic stands for unsigned."""
    ids = torch.arange(vocab_size, dtype=torch.int32, device=device).mul_(_signed(0x9E3779B9))
    x = ids + torch.from_numpy(keys.view(np.int32)).to(device)[:, None]
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _signed(0x7FEB352D)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    u = x.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2**-31).clamp_(max=1 - 2**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def _signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


@dataclass(frozen=True, slots=True)
class _Some:
    """Some of the rows: `index` (S,) into the R rows on the device, `p` their parameters."""

    index: Tensor
    p: NDArray[np.void]

    def __len__(self) -> int:
        return len(self.p)

    def column(self, name: str) -> Tensor:
        """(S, 1) float32 or int32, on the device."""
        return torch.from_numpy(self.p[name].copy()).to(self.index.device)[:, None]


class _Rows:
    """The R rows of a step with their parameters, for picking out those that need something."""

    def __init__(self, slots: Slots, inputs: StepInputs) -> None:
        self.state = slots
        self.slots = inputs.slots[inputs.samples]
        self.positions = (inputs.starts + inputs.counts)[inputs.samples]  # of the token to be sampled
        self.all = slots.parameters.rows[self.slots]

    def where(self, mask: NDArray[np.bool_]) -> _Some:
        """The rows of a mask (R,)."""
        return _Some(torch.from_numpy(np.flatnonzero(mask)).to(self.state.device), self.all[mask])

    def random(self) -> NDArray[np.bool_]:
        """(R,) which rows are sampled; the others take the likeliest."""
        mask: NDArray[np.bool_] = self.all["temperature"] > 0
        return mask


def _masked(logits: Tensor, masks: Masks) -> Tensor:
    """Minus infinity where a mask says no: a new (R, V)."""
    index = torch.from_numpy(masks.rows.astype(np.int64)).to(logits.device)
    allowed = np.unpackbits(masks.bits.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    forbidden = torch.from_numpy(allowed).to(logits.device) == 0
    return logits.index_copy(0, index, logits[index].masked_fill_(forbidden, -torch.inf))


def _penalize(logits: Tensor, rows: _Rows) -> Tensor:
    """Watermarks, biases, penalties, bans: a new (R, V)."""
    p, scores = rows.all, logits.clone()
    for row in np.flatnonzero(p["watermark_gamma"] > 0).tolist():
        previous_id = int(rows.state.tokens[int(rows.slots[row]), int(rows.positions[row]) - 1])
        green = _green_ids(previous_id, float(p["watermark_gamma"][row]), scores.shape[1])
        scores[row, green.to(scores.device)] += float(p["watermark_delta"][row])
    biased = p["num_biases"] > 0
    if biased.any():
        held, some = rows.state.parameters, rows.slots[biased]
        width = int(p["num_biases"].max())
        active = held.bias_until[some, :width] > rows.positions[biased][:, None]
        values = np.where(active, held.bias_values[some, :width], np.float32(0))
        index = rows.where(biased).index
        ids = torch.from_numpy(held.bias_ids[some, :width].astype(np.int64)).to(logits.device)
        scores[index] = scores[index].scatter_add_(1, ids, torch.from_numpy(values).to(logits.device))
    mask = (p["repetition"] != 1) | (p["frequency"] != 0) | (p["presence"] != 0)
    if mask.any():
        some_rows = rows.where(mask)
        scores[some_rows.index] = _repetition(scores[some_rows.index], some_rows, rows, mask)
    return scores


def _green_ids(previous_id: int, gamma: float, vocab_size: int) -> Tensor:
    """`backends.sampling.green_ids`: what that writes out is what torch does on a CPU."""
    generator = torch.Generator().manual_seed(WATERMARK_KEY * previous_id)
    return torch.randperm(vocab_size, generator=generator)[: int(vocab_size * gamma)]


def _repetition(scores: Tensor, some: _Some, rows: _Rows, mask: NDArray[np.bool_]) -> Tensor:
    """The three penalties, on (S, V) scores."""
    device = scores.device
    lengths = torch.from_numpy(rows.positions[mask]).to(device)[:, None]
    slots = torch.from_numpy(rows.slots[mask].astype(np.int64)).to(device)
    tokens = rows.state.tokens[slots, : int(rows.positions[mask].max())].long()  # (S, L)
    positions = torch.arange(tokens.shape[1], device=device)
    known = torch.where(positions < lengths, tokens, tokens[:, :1])  # an id of the prompt twice changes nothing
    found, r = scores.gather(1, known), some.column("repetition")
    scores = scores.scatter(1, known, torch.where(found < 0, found * r, found / r))
    if some.p["frequency"].any() or some.p["presence"].any():
        output = ((positions >= some.column("num_prompt")) & (positions < lengths)).float()
        counts = torch.zeros_like(scores).scatter_add_(1, tokens.clamp(0, scores.shape[1] - 1), output)
        scores = scores - some.column("frequency") * counts - some.column("presence") * (counts > 0)
    return scores


def _tempered(scores: Tensor, rows: _Rows) -> Tensor:
    """Over the temperature; rows that are not sampled as they are. A new (R, V)."""
    temperature = np.where(rows.random(), np.maximum(rows.all["temperature"], np.float32(1e-6)), np.float32(1))
    return scores / torch.from_numpy(temperature).to(scores.device)[:, None]


def _filter(scores: Tensor, rows: _Rows, full: bool) -> Tensor:
    """Put minus infinity where an id may not be chosen; in place."""
    if not full:
        return scores
    p, random = rows.all, rows.random()
    for mask, keep in (
        (p["min_p"] > 0, _keep_min_p),
        ((p["top_k"] > 0) & (p["top_k"] < scores.shape[1]), _keep_top_k),
        (p["top_p"] < 1, _keep_top_p),
        (p["typical_p"] < 1, _keep_typical),
    ):
        some = rows.where(mask & random)
        if len(some) == len(p):
            keep(scores, some)
        elif len(some):
            scores[some.index] = keep(scores[some.index], some)
    return scores


def _keep_min_p(scores: Tensor, some: _Some) -> Tensor:
    least = scores.amax(-1, keepdim=True) + some.column("min_p").log()
    return scores.masked_fill_(scores < least, -torch.inf)


def _keep_top_k(scores: Tensor, some: _Some) -> Tensor:
    best = scores.topk(int(some.p["top_k"].max())).values
    least = best.gather(1, some.column("top_k").long() - 1)
    return scores.masked_fill_(scores < least, -torch.inf)


def _keep_top_p(scores: Tensor, some: _Some) -> Tensor:
    least = _least_of_top_p(scores, scores.logsumexp(-1, keepdim=True), some.column("top_p"), _LIKELY)
    return scores.masked_fill_(scores < least, -torch.inf)


def _least_of_top_p(scores: Tensor, total: Tensor, p: Tensor, width: int) -> Tensor:
    """(S, 1) the smallest score that top-p keeps; rows whose `width` likeliest ids do not make up p look further."""
    whole = width >= scores.shape[1]
    best = scores.sort(-1, descending=True).values if whole else scores.topk(width).values
    share = (best - total).exp()
    last = ((share.cumsum(-1) - share) < p).sum(-1, keepdim=True) - 1  # sums only grow: the kept stand first
    least = best.gather(1, last.clamp(min=0))
    if not whole:
        rest = (share.sum(-1) < p[:, 0]).nonzero()[:, 0]
        if len(rest):
            least[rest] = _least_of_top_p(scores[rest], total[rest], p[rest], width * 16)
    return least


def _keep_typical(scores: Tensor, some: _Some) -> Tensor:
    logprobs = scores.log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -(probabilities * logprobs).nan_to_num(0.0).sum(-1, keepdim=True)  # 0 · -inf is 0
    distance = (logprobs + entropy).abs()  # infinite for ids that are out already
    nearest, order = distance.sort(-1)
    share = probabilities.gather(1, order)
    last = ((share.cumsum(-1) - share) < some.column("typical_p")).sum(-1, keepdim=True) - 1
    return scores.masked_fill_(distance > nearest.gather(1, last.clamp(min=0)), -torch.inf)


def _choose(scores: Tensor, likeliest: Tensor, rows: _Rows) -> Tensor:
    """(R,) ids: of the rows that are sampled, the largest of score and noise."""
    random = rows.random()
    some = rows.where(random)
    if not len(some):
        return likeliest
    keys = noise_keys(some.p["seed_low"], some.p["seed_high"], rows.positions[random])
    noise = gumbel(keys, scores.shape[1], scores.device)
    if len(some) == len(random):
        return noise.add_(scores).argmax(-1)
    return likeliest.index_copy(0, some.index, noise.add_(scores[some.index]).argmax(-1))


def _logprobs(scores: Tensor, unprocessed: Tensor, raw: _Some, token_ids: Tensor, rows: _Rows, most: int) -> Logprobs:
    """Of all R rows: of the scores that were sampled from, and of the logits as they were where `raw` says so."""
    wanted = np.minimum(rows.all["logprobs"], most).astype(np.int32)
    source = scores
    if len(raw) and scores is not unprocessed:
        source = scores.index_copy(0, raw.index, unprocessed)
    found = _log_softmax_of(source, token_ids.clamp(min=0), wanted, ~rows.all["raw_logprobs"])
    broken = (token_ids < 0).cpu().numpy()
    return replace(found, wanted=np.where(broken, -1, wanted).astype(np.int32))


def _log_softmax_of(scores: Tensor, token_ids: Tensor, wanted: NDArray[np.int32], ties: NDArray[np.bool_]) -> Logprobs:
    """Log-probabilities of ids (M,) under scores (M, V), and of the likeliest."""
    total = scores.logsumexp(-1, keepdim=True)
    most = max(int(wanted.max(initial=0)), 0)
    if most and ties.any():
        most = min(most + MOST_TIES, scores.shape[1])
    top, top_ids = scores.topk(most)
    return Logprobs((scores.gather(1, token_ids[:, None]) - total)[:, 0], top_ids, top - total, wanted, ties)
