"""Sampling of all rows of a step at once: tokens and log-probabilities. The rules: `backends/sampling.py`.

The host, which holds the parameters, selects the rows that a rule applies to, so a batch pays for a filter only on the
rows that asked for it.

R rows that sample, V vocabulary, S some of the rows, L length of the longest of them, P prompt positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.base import Masks, StepInputs
from tokenmill.backends.sampling import (
    FILTERS,
    LEAST_TEMPERATURE,
    MOST_TIES,
    WATERMARK_KEY,
    active_steps,
    is_random,
    noise_keys,
    num_listed,
)
from tokenmill.backends.torch.slots import Slots
from tokenmill.wire.messages import TokenDetails

_LIKELY = 256  # ids that top-p sorts first; rows that need more sort more


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of M rows: of each row's token and of the n likeliest ids, best first."""

    chosen: Tensor  # (M,)
    top_ids: Tensor  # (M, n)
    top: Tensor  # (M, n)
    wanted: NDArray[np.int32]  # (M,) number of ids that each row asked for; -1: no log-probabilities
    ties: NDArray[np.bool_]  # (M,) whether ids that tie with the last wanted one are listed too

    def details(self) -> list[TokenDetails | None]:
        """Return them on the host, one a row, without ids that a filter removed. Waits for the device."""
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
    """Sampled tokens and their log-probabilities, on the device."""

    token_ids: Tensor  # (R,) int64; -1: the row's logits were not finite
    logprobs: Logprobs | None = None  # of the R rows; None if no row asked


@torch.inference_mode()
def sample(logits: Tensor, slots: Slots, inputs: StepInputs, masks: Masks | None = None) -> Sampled:
    """Choose the next token of every row of `inputs.samples` from `logits` (R, V), any float type.

    May overwrite `logits`. The caller records the ids (`Slots.record`) once all ranks have them.
    """
    logits = logits.float()
    best, token_ids = logits.max(-1)  # a NaN is larger than anything here
    finite = best.isfinite()
    rows = _Rows(slots, inputs)
    raw = rows.where((rows.all["logprobs"] >= 0) & (rows.all["raw_logprobs"] != 0))
    masked, unprocessed = masks is not None and len(masks.rows) > 0, logits
    if inputs.logprobs >= 0 and len(raw) and (masked or inputs.tail != "greedy"):
        unprocessed = logits[raw.index]
    scores = logits
    if masks is not None and masked:
        scores = _masked(scores, masks)
        best, token_ids = scores.max(-1)
    active = active_steps(rows.all, logits.shape[1]) if inputs.tail == "full" else {}
    if active:
        scores = _process(scores, rows, active)
        best, token_ids = scores.max(-1)
    finite &= best > -torch.inf
    if inputs.tail != "greedy":
        scores = _tempered(scores, rows)
        if active:
            _filter(scores, rows, active)
        token_ids = _choose(scores, token_ids, rows)
    token_ids = torch.where(finite, token_ids, -1)
    if inputs.logprobs < 0:
        return Sampled(token_ids)
    return Sampled(token_ids, _logprobs(scores, unprocessed, raw, token_ids, rows, inputs.logprobs))


@torch.inference_mode()
def score(logits: Tensor, token_ids: Tensor, wanted: NDArray[np.int32]) -> list[TokenDetails | None]:
    """Return the details of ids (P,) under logits (P, V) as they are; None where `wanted`, ids to list, is -1."""
    exact = np.zeros(len(wanted), np.bool_)
    return _log_softmax_of(logits.float(), token_ids, wanted, exact).details()


def gumbel(keys: NDArray[np.uint32], vocab_size: int, device: torch.device) -> Tensor:
    """Return noise (S, V) under keys (S,). Wrapping int32 arithmetic stands for unsigned."""
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
        """Return a parameter (S, 1), float32 or int32, on the device."""
        return torch.from_numpy(self.p[name].copy()).to(self.index.device)[:, None]


class _Rows:
    """The R rows of a step that sample, with their parameters."""

    def __init__(self, slots: Slots, inputs: StepInputs) -> None:
        self.state = slots
        self.slots = inputs.slots[inputs.samples]
        self.positions = (inputs.starts + inputs.counts)[inputs.samples]  # of the token to be sampled
        self.all = slots.parameters.rows[self.slots]
        self.random = is_random(self.all)

    def where(self, mask: NDArray[np.bool_]) -> _Some:
        """Return the rows of a mask (R,)."""
        return _Some(torch.from_numpy(np.flatnonzero(mask)).to(self.state.device), self.all[mask])


def _masked(logits: Tensor, masks: Masks) -> Tensor:
    """Set the logits of forbidden ids to minus infinity. Returns a new (R, V)."""
    index = torch.from_numpy(masks.rows.astype(np.int64)).to(logits.device)
    allowed = np.unpackbits(masks.bits.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    forbidden = torch.from_numpy(allowed).to(logits.device) == 0
    return logits.index_copy(0, index, logits[index].masked_fill_(forbidden, -torch.inf))


def _process(logits: Tensor, rows: _Rows, active: dict[str, NDArray[np.bool_]]) -> Tensor:
    """Apply watermarks, biases, bans and penalties. Returns a new (R, V)."""
    scores = logits.clone()
    for row in np.flatnonzero(active["watermark"]).tolist():
        previous_id = int(rows.state.tokens[int(rows.slots[row]), int(rows.positions[row]) - 1])
        green = green_ids(previous_id, float(rows.all["watermark_gamma"][row]), scores.shape[1])
        scores[row, green.to(scores.device)] += float(rows.all["watermark_delta"][row])
    if active["biases"].any():
        _bias(scores, rows, active["biases"])
    if active["penalties"].any():
        some = rows.where(active["penalties"])
        scores[some.index] = _penalize(scores[some.index], some, rows, active["penalties"])
    return scores


def _bias(scores: Tensor, rows: _Rows, biased: NDArray[np.bool_]) -> None:
    """Add the biases of the rows of a mask, in place."""
    held, slots = rows.state.parameters, rows.slots[biased]
    width = int(rows.all["num_biases"].max())
    active = held.bias_until[slots, :width] > rows.positions[biased][:, None]
    values = np.where(active, held.bias_values[slots, :width], np.float32(0))
    index = rows.where(biased).index
    ids = torch.from_numpy(held.bias_ids[slots, :width].astype(np.int64)).to(scores.device)
    scores[index] = scores[index].scatter_add_(1, ids, torch.from_numpy(values).to(scores.device))


def green_ids(previous_id: int, gamma: float, vocab_size: int) -> Tensor:
    """Return `backends.sampling.green_ids`, in torch's own code on a CPU."""
    generator = torch.Generator().manual_seed(WATERMARK_KEY * previous_id)
    return torch.randperm(vocab_size, generator=generator)[: int(vocab_size * gamma)]


def _penalize(scores: Tensor, some: _Some, rows: _Rows, mask: NDArray[np.bool_]) -> Tensor:
    """Apply the three penalties to scores (S, V)."""
    device = scores.device
    lengths = torch.from_numpy(rows.positions[mask]).to(device)[:, None]
    slots = torch.from_numpy(rows.slots[mask].astype(np.int64)).to(device)
    tokens = rows.state.tokens[slots, : int(rows.positions[mask].max())].long()  # (S, L)
    positions = torch.arange(tokens.shape[1], device=device)
    first = some.column("num_prompt").long() - 1 if rows.state.skips_inputs else torch.zeros_like(lengths)
    counted = (positions < lengths) & (positions >= first)
    seen = torch.where(counted, tokens, tokens.gather(1, first))  # an id of the prompt twice changes nothing
    before, r = scores.gather(1, seen), some.column("repetition")
    scores = scores.scatter(1, seen, torch.where(before < 0, before * r, before / r))
    if some.p["frequency"].any() or some.p["presence"].any():
        output = ((positions >= some.column("num_prompt")) & (positions < lengths)).float()
        counts = torch.zeros_like(scores).scatter_add_(1, tokens.clamp(0, scores.shape[1] - 1), output)
        scores = scores - some.column("frequency") * counts - some.column("presence") * (counts > 0)
    return scores


def _tempered(scores: Tensor, rows: _Rows) -> Tensor:
    """Divide by the temperature, except in rows that take the likeliest id. Returns a new (R, V)."""
    least = np.maximum(rows.all["temperature"], np.float32(LEAST_TEMPERATURE))
    temperature = np.where(rows.random, least, np.float32(1))
    return scores / torch.from_numpy(temperature).to(scores.device)[:, None]


def _filter(scores: Tensor, rows: _Rows, active: dict[str, NDArray[np.bool_]]) -> None:
    """Set the scores of removed ids to minus infinity, in place."""
    for name in FILTERS:
        some = rows.where(active[name])
        if len(some) == len(rows.all):
            _KEEP[name](scores, some)
        elif len(some):
            scores[some.index] = _KEEP[name](scores[some.index], some)


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
    """Return the smallest score (S, 1) that top-p keeps. Rows whose `width` likeliest ids fall short sort more."""
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


_KEEP = {"min_p": _keep_min_p, "top_k": _keep_top_k, "top_p": _keep_top_p, "typical_p": _keep_typical}


def _choose(scores: Tensor, likeliest: Tensor, rows: _Rows) -> Tensor:
    """Return ids (R,): the largest score plus noise in rows that sample, `likeliest` in the others."""
    some = rows.where(rows.random)
    if not len(some):
        return likeliest
    keys = noise_keys(some.p["seed_low"], some.p["seed_high"], rows.positions[rows.random])
    noise = gumbel(keys, scores.shape[1], scores.device)
    if len(some) == len(rows.random):
        return noise.add_(scores).argmax(-1)
    return likeliest.index_copy(0, some.index, noise.add_(scores[some.index]).argmax(-1))


def _logprobs(scores: Tensor, unprocessed: Tensor, raw: _Some, token_ids: Tensor, rows: _Rows, most: int) -> Logprobs:
    """Return log-probabilities of all R rows: of the final scores, but of `unprocessed` in the rows of `raw`."""
    wanted = np.minimum(rows.all["logprobs"], most).astype(np.int32)
    source = scores
    if len(raw) and scores is not unprocessed:
        source = scores.index_copy(0, raw.index, unprocessed)
    found = _log_softmax_of(source, token_ids.clamp(min=0), wanted, rows.all["raw_logprobs"] == 0)
    broken = (token_ids < 0).cpu().numpy()
    return replace(found, wanted=np.where(broken, -1, wanted).astype(np.int32))


def _log_softmax_of(scores: Tensor, token_ids: Tensor, wanted: NDArray[np.int32], ties: NDArray[np.bool_]) -> Logprobs:
    """Return log-probabilities of ids (M,) under scores (M, V), and of the likeliest ids."""
    total = scores.logsumexp(-1, keepdim=True)
    top, top_ids = scores.topk(num_listed(wanted, ties, scores.shape[1]))
    return Logprobs((scores.gather(1, token_ids[:, None]) - total)[:, 0], top_ids, top - total, wanted, ties)
