"""Attention over the paged KV cache, vectorized: planned once a step for each block table, used by all its layers.

Sequences are cut into runs of at most `RUN` queries. Runs of similar size and context share a bucket, and a bucket is
one gather of keys and values and one attention call. A layer therefore costs a few calls for any number of sequences.

T tokens of the step, B runs of a bucket, Q queries of its longest run, L keys of its longest context, H heads,
G key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the customary name
from torch import Tensor

from tokenmill.backends.base import StepInputs
from tokenmill.program import ops

RUN = 128  # queries of a run. Shorter runs compute fewer scores of later keys, which are masked.
KEYS = 1 << 16  # keys of a bucket: bounds the memory of the gather
MASK = 1 << 22  # elements of a bucket's mask
KEPT = 1 << 24  # elements of masks that all layers share; with more, each layer makes its own


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive queries of one sequence. `first`: index of the first one among the step's tokens."""

    row: int
    first: int
    start: int  # its position
    count: int
    begin: int = 0  # position of the first key that a query attends to

    @property
    def context(self) -> int:
        """Number of keys that the queries attend to."""
        return self.start + self.count - self.begin


@dataclass(slots=True)
class Bucket:
    """Runs of similar size. Padding repeats a run's last query and last key, so it reads nothing of other sequences."""

    queries: Tensor  # (B, Q) indices among the T tokens
    positions: Tensor  # (B, Q) of the queries, counted from their run's first key
    keys: Tensor  # (B · L,) places in the cache
    real: Tensor | None  # indices of the B · Q queries that are not padding; None: all
    tokens: Tensor  # their indices among the T tokens
    begins: Tensor  # (B, 1) positions of the runs' first keys
    kept: dict[tuple[int, int], Tensor | None] | None  # (window, chunk) -> mask of layers; None: too large to share
    widest: int = 0  # L
    uneven: bool = True  # a mask is needed even without a window

    def mask(self, window: int, dtype: torch.dtype, chunk: int = 0) -> Tensor | None:
        """Return (B, 1, Q, L): 0 where a query attends to a key, else minus infinity. None if no mask is needed."""
        key = window, chunk
        if self.kept is not None and key in self.kept:
            return self.kept[key]
        made = self._mask(window, chunk, dtype)
        if self.kept is not None:
            self.kept[key] = made
        return made

    def biased(self, mask: Tensor | None, slopes: Tensor) -> Tensor:
        """Return `mask` plus ALiBi, (B, H, Q, L): slope of the head · (position of the key − that of the query)."""
        keys = torch.arange(self.widest, device=self.positions.device)
        bias = (keys - self.positions[:, None, :, None]) * slopes[:, None, None]
        return bias if mask is None else bias + mask

    def _mask(self, window: int, chunk: int, dtype: torch.dtype) -> Tensor | None:
        if not self.uneven and not 0 < window < self.widest and not chunk:
            return None
        keys = torch.arange(self.widest, device=self.positions.device)
        behind = self.positions[..., None] - keys  # (B, Q, L)
        hidden = (behind < 0) | (behind >= window) if window else behind < 0
        if chunk:
            hidden |= behind > ((self.positions + self.begins) % chunk)[..., None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None]


@dataclass(slots=True)
class AttentionPlan:
    """Plan of a step's attention in one block table. `places` (T,): place of each token in the cache."""

    places: Tensor
    buckets: list[Bucket] = field(default_factory=list)


def plan(
    inputs: StepInputs, tables: Tensor, block_size: int, positions: Tensor, rows: Tensor, window: int = 0
) -> AttentionPlan:
    """Plan a step. `tables` (S, blocks): block tables of its rows. `positions` (T,), `rows` (T,): of its tokens.

    `window`: of all layers of the table, whose earlier blocks are not read; 0: none.
    """
    blocks = tables[rows, positions // block_size].long()
    made = AttentionPlan(blocks * block_size + positions % block_size)
    groups = bucketed(runs_of(inputs, window))
    elements = sum(len(g) * max(r.count for r in g) * max(r.context for r in g) for g in groups)
    made.buckets = [bucket_of(group, tables, block_size, elements <= KEPT) for group in groups]
    return made


def runs_of(inputs: StepInputs, window: int = 0) -> list[Run]:
    """Cut the step's rows into runs."""
    runs: list[Run] = []
    first = 0
    for row, (start, count) in enumerate(zip(inputs.starts.tolist(), inputs.counts.tolist(), strict=True)):
        longest = max(1, min(RUN, MASK // (start + count)))
        for done in range(0, count, longest):
            begin = max(start + done - window + 1, 0) if window else 0
            runs.append(Run(row, first + done, start + done, min(longest, count - done), begin))
        first += count
    return runs


def bucketed(runs: list[Run]) -> list[list[Run]]:
    """Group runs of similar size and context: at most half of a bucket's keys are padding, short contexts aside."""
    buckets: list[list[Run]] = []
    for run in sorted(runs, key=lambda r: (_size_class(r.count), r.context), reverse=True):
        if buckets:
            top = buckets[-1][0]  # It has the longest context.
            n = len(buckets[-1]) + 1
            queries = max(r.count for r in buckets[-1])
            similar = _size_class(run.count) == _size_class(top.count) and run.context * 2 >= min(top.context, 256)
            if similar and n * top.context <= KEYS and n * queries * top.context <= MASK:
                buckets[-1].append(run)
                continue
        buckets.append([run])
    return buckets


def _size_class(count: int) -> int:
    return (count - 1).bit_length()  # 1 | 2 | 3, 4 | 5 … 8 | …


def bucket_of(runs: list[Run], tables: Tensor, block_size: int, keep: bool, whole: bool = False) -> Bucket:
    """Return the bucket of some runs. `keep`: all layers share its masks. `whole`: all queries see all keys of a run.

    `tables` (S, blocks): block tables of the step's rows.
    """
    device = tables.device
    first, start, count, row, begin = (
        np.array([getattr(r, name) for r in runs], np.int64)[:, None]
        for name in ("first", "start", "count", "row", "begin")
    )
    start -= begin
    contexts = start + count
    widest, deepest = int(contexts.max()), int(count.max())
    within = np.minimum(np.arange(deepest), count - 1)  # (B, Q)
    padded = np.arange(deepest) >= count
    keys = torch.from_numpy(np.minimum(np.arange(widest), contexts - 1) + begin).to(device)  # (B, L) positions
    rows = torch.from_numpy(row).to(device)
    places = tables[rows, keys // block_size].long() * block_size + keys % block_size
    real = torch.from_numpy(np.flatnonzero(~padded)).to(device) if padded.any() else None
    return Bucket(
        queries=torch.from_numpy(first + within).to(device),
        positions=torch.from_numpy(contexts - 1 + 0 * within if whole else start + within).to(device),
        keys=places.reshape(-1),
        real=real,
        tokens=torch.from_numpy((first + within)[~padded]).to(device),
        begins=torch.from_numpy(begin).to(device),
        kept={} if keep else None,
        widest=widest,
        uneven=deepest > 1 or bool((contexts != widest).any()),
    )


class Scratch:
    """Memory of the gathered keys and values, reused by all buckets: allocating it would cost more than the gather."""

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def room(self, rows: int, like: Tensor) -> Tensor:
        """Return (2, rows, width) as wide as `like`, valid until the next call."""
        size = 2 * rows * like.shape[-1]
        if self._held is None or self._held.numel() < size:
            self._held = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._held[:size].view(2, rows, like.shape[-1])


class Heads(Protocol):
    """The fields of an attention that decide how it attends, as in `ops.Attention`."""

    @property
    def head_dim(self) -> int:
        """Columns of a head."""

    @property
    def scale(self) -> float:
        """Factor of the scores."""

    @property
    def window(self) -> int:
        """Size of the sliding window; 0: none."""

    @property
    def chunk(self) -> int:
        """Size of the chunks that tokens attend within; 0: none."""

    @property
    def softcap(self) -> float:
        """Soft cap of the scores; 0: none."""


def attend(
    op: Heads,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    plan: AttentionPlan,
    scratch: Scratch,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Write k and v (T, G · D) to `cache` (2, places, G · D), attend, and return (T, H · D).

    `slopes` (H,): ALiBi's. `sinks` (H,): scores that take a share of the softmax and have no value.
    """
    cache[0].index_copy_(0, plan.places, k)
    cache[1].index_copy_(0, plan.places, v)
    made = torch.empty_like(q)
    for bucket in plan.buckets:
        b, n = bucket.queries.shape
        heads = F.embedding(bucket.queries, q).view(b, n, -1, op.head_dim).transpose(1, 2)  # (B, H, Q, D)
        keys, values = (
            torch.index_select(kept, 0, bucket.keys, out=out).view(b, bucket.widest, -1, op.head_dim).transpose(1, 2)
            for kept, out in zip(cache, scratch.room(len(bucket.keys), cache), strict=True)
        )  # (B, G, L, D)
        mask = bucket.mask(op.window, q.dtype, op.chunk)
        mask = mask if slopes is None else bucket.biased(mask, slopes)
        y = _scaled(op, heads, keys, values, mask, sinks)
        y = y.transpose(1, 2).reshape(b * n, -1)
        made[bucket.tokens] = y if bucket.real is None else y[bucket.real]
    return made


def attend_latent(
    op: ops.LatentAttention,
    q: Tensor,
    latent: Tensor,
    key: Tensor,
    expand: Tensor,
    cache: Tensor,
    plan: AttentionPlan,
    scratch: Scratch,
) -> Tensor:
    """Write latent (T, R) and the rotated key (T, K) to `cache` (1, places, R + K), attend, and return (T, H · V).

    The expansion of keys is applied to the queries, and that of values to the results, so that all heads attend to the
    compressed rows. `q`: (T, H, D), rotated. `expand`: (H · (D − K + V), R).
    """
    cache[0].index_copy_(0, plan.places, torch.cat([latent, key], -1))
    rank, plain = latent.shape[1], op.head_dim - key.shape[1]
    of_heads = expand.view(q.shape[1], -1, rank)
    of_keys, of_values = of_heads[:, :plain], of_heads[:, plain:]
    queries = torch.cat([torch.einsum("thd,hdr->thr", q[..., :plain], of_keys), q[..., plain:]], -1)  # (T, H, R + K)
    made = q.new_empty(*q.shape[:2], rank)
    for bucket in plan.buckets:
        room = scratch.room(len(bucket.keys), cache)[0]
        keys = torch.index_select(cache[0], 0, bucket.keys, out=room).view(len(bucket.queries), 1, bucket.widest, -1)
        mask = bucket.mask(0, q.dtype)
        y = F.scaled_dot_product_attention(
            queries[bucket.queries].transpose(1, 2), keys, keys[..., :rank], mask, scale=op.scale, enable_gqa=True
        )
        y = y.transpose(1, 2).flatten(0, 1)
        made[bucket.tokens] = y if bucket.real is None else y[bucket.real]
    return torch.einsum("thr,hvr->thv", made, of_values).flatten(1)


def _scaled(op: Heads, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
    if not op.softcap and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=op.scale, enable_gqa=True)
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * op.scale
    if op.softcap:
        scores = op.softcap * torch.tanh(scores / op.softcap)
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        last = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        shares = torch.cat([scores, last.to(scores.dtype)], -1).float().softmax(-1)[..., :-1]
        return shares.to(q.dtype) @ v.repeat_interleave(group, 1)
    return scores.float().softmax(-1).to(q.dtype) @ v.repeat_interleave(group, 1)


def scratch_bytes(
    max_total_tokens: int, max_batch_tokens: int, widest_kv: int, item_bytes: int, score_heads: int = 0
) -> int:
    """Return the bytes that the buckets of a step need at most: gathered keys and values, masks, and scores.

    `score_heads`: most heads of a layer whose scores of all heads are held, as `holds_scores` returns; 0: no layer.
    """
    keys = max(KEYS, max_total_tokens) * widest_kv * 2
    pairs = max_batch_tokens * max_total_tokens
    mask, kept = min(max(MASK, max_total_tokens), pairs), min(KEPT, pairs)
    scores = score_heads * mask * (2 * item_bytes + 2 * 4)  # two copies, then the softmax in float32
    return (keys + mask + kept) * item_bytes + scores


def holds_scores(op: ops.Attention) -> bool:
    """Return True if a layer's scores, or biases, of all heads are in memory at the same time."""
    return bool(op.alibi or op.softcap or op.sinks is not None)
