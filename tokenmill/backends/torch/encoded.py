"""The torch backend for a program with an encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the customary name
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.base import StepInputs
from tokenmill.backends.encoded import completed_inputs, input_lengths, of_decoder
from tokenmill.backends.kind import Job
from tokenmill.backends.torch.attention import RUN, Bucket, Run, bucket_of, bucketed
from tokenmill.backends.torch.backend import TorchBackend
from tokenmill.backends.torch.states import StatePlan
from tokenmill.backends.torch.step_state import StepState
from tokenmill.program import encoded
from tokenmill.program.encoded import CrossAttention, DecoderAttention, EncoderAttention, InputIds, StoreInput
from tokenmill.program.ops import Op, Weight


@dataclass(slots=True)
class EncodedState(StepState):
    """State of a step of the decoder, or of one run of the encoder."""

    ids: Tensor | None = None  # (n,) of the input; None in a step of the decoder
    places: Tensor | None = None  # (n,) of the input's tokens in the cache
    own: list[Bucket] = field(default_factory=list)  # attention to the decoder's tokens
    cross: list[Bucket] = field(default_factory=list)  # attention to the input's
    biases: dict[tuple[Weight, int], Tensor] = field(default_factory=dict)  # by weight and place in `own`


class EncoderDecoderBackend(TorchBackend):
    """Implements `backends.base.Backend` for a program with an encoder."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._slots.skips_inputs = True

    def more_kernels(self) -> Mapping[type[Op], Callable[..., Any]]:
        """Return the kernels of the operations in `program/encoded.py`."""
        return {
            InputIds: lambda op, step: step.ids[:, None],
            EncoderAttention: encoder_attention,
            StoreInput: store_input,
            DecoderAttention: decoder_attention,
            CrossAttention: cross_attention,
        }

    def more_bytes(self) -> int:
        """Return the bytes of the scores and biases of a run of the encoder's queries."""
        heads = max(op.q.width // op.head_dim for op in self.program.ops if isinstance(op, EncoderAttention))
        return 4 * RUN * self.limits.max_total_tokens * heads * 4

    def begin(self, inputs: StepInputs) -> StepInputs:
        """Apply the changes of slots, run the encoder where an input is complete, and return the decoder's step."""
        super().begin(inputs)
        lengths = input_lengths(inputs.slots, self._slots.parameters.rows)
        for slot, length in completed_inputs(inputs, lengths):
            self._encode(slot, length)
        return of_decoder(inputs, lengths)

    def _encode(self, slot: int, length: int) -> None:
        positions = torch.arange(length, device=self.device)
        block = self.limits.block_size
        places = self._slots.tables[slot, positions // block].long() * block + positions % block
        state = EncodedState(
            self._weights, self._cache, self.group, positions, {}, positions[:0], self._scratch, StatePlan([], {}),
            ids=self._slots.tokens[slot, :length].long(), places=places,
        )  # fmt: skip
        self._interpreter.encode(state)

    def _state(self, inputs: StepInputs) -> tuple[StepState, Tensor]:
        state, ids = super()._state(inputs)
        lengths = input_lengths(inputs.slots, self._slots.parameters.rows)
        tables, block = self._slots.tables[self._to_device(inputs.slots)], self.limits.block_size
        runs = _runs(inputs, lengths)
        own = [bucket_of(group, tables, block, keep=True) for group in bucketed(runs[0])]
        cross = [bucket_of(group, tables, block, keep=True, whole=True) for group in bucketed(runs[1])]
        given = {name.name: getattr(state, name.name) for name in fields(StepState)}
        return EncodedState(**given, own=own, cross=cross), ids


def _runs(inputs: StepInputs, lengths: NDArray[np.int32]) -> tuple[list[Run], list[Run]]:
    """Return the runs of attention to the decoder's tokens, and of that to the inputs."""
    own, cross, first = [], [], 0
    rows = zip(inputs.starts.tolist(), inputs.counts.tolist(), lengths.tolist(), strict=True)
    for row, (start, count, length) in enumerate(rows):
        for done in range(0, count, RUN):
            n = min(RUN, count - done)
            own.append(Run(row, first + done, start + done, n, length))
            cross.append(Run(row, first + done, length - n, n))
        first += count
    return own, cross


def encoder_attention(op: EncoderAttention, step: EncodedState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in both directions, for RUN queries at a time."""
    heads = [x.view(len(x), -1, op.head_dim).transpose(0, 1)[None] for x in (q, k, v)]
    positions, table, made = step.positions, step.weights[op.bias], torch.empty_like(q)
    for start in range(0, len(q), RUN):
        some = slice(start, start + RUN)
        distance = positions - positions[some, None]
        bias = table[buckets_of(distance, len(table), op.longest, both_sides=True)].permute(2, 0, 1)[None]
        y = F.scaled_dot_product_attention(heads[0][:, :, some], heads[1], heads[2], bias.to(q.dtype), scale=op.scale)
        made[some] = y[0].transpose(0, 1).flatten(1)
    return made


def store_input(op: StoreInput, step: EncodedState, k: Tensor, v: Tensor) -> Tensor:
    """Write keys and values at the positions of the input."""
    assert step.places is not None
    cache = step.cache[op.layer]
    cache[0].index_copy_(0, step.places, k)
    cache[1].index_copy_(0, step.places, v)
    return k


def decoder_attention(op: DecoderAttention, step: EncodedState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Write the cache and attend to the decoder's tokens, with a bias by distance."""
    cache, places = step.cache[op.layer], step.attention[op.layer].places
    cache[0].index_copy_(0, places, k)
    cache[1].index_copy_(0, places, v)
    table = step.weights[op.bias]

    def mask(number: int, bucket: Bucket) -> Tensor:
        if (op.bias, number) not in step.biases:
            distance = torch.arange(bucket.widest, device=q.device) - bucket.positions[..., None]
            bias = table[buckets_of(distance, len(table), op.longest, both_sides=False)].permute(0, 3, 1, 2)
            hidden = bucket.mask(0, q.dtype)
            step.biases[op.bias, number] = (bias if hidden is None else bias + hidden).to(q.dtype)
        return step.biases[op.bias, number]

    return _attended(op, step, q, step.own, mask)


def cross_attention(op: CrossAttention, step: EncodedState, q: Tensor) -> Tensor:
    """Attend to the input."""
    return _attended(op, step, q, step.cross, lambda number, bucket: bucket.mask(0, q.dtype))


def _attended(
    op: DecoderAttention | CrossAttention,
    step: EncodedState,
    q: Tensor,
    buckets: list[Bucket],
    mask: Callable[[int, Bucket], Tensor | None],
) -> Tensor:
    """Attend to the keys of each bucket. Return (T, H · D)."""
    cache, made = step.cache[op.layer], torch.empty_like(q)
    for number, bucket in enumerate(buckets):
        b, n = bucket.queries.shape
        heads = F.embedding(bucket.queries, q).view(b, n, -1, op.head_dim).transpose(1, 2)
        keys, values = (
            torch.index_select(kept, 0, bucket.keys, out=out).view(b, bucket.widest, -1, op.head_dim).transpose(1, 2)
            for kept, out in zip(cache, step.scratch.room(len(bucket.keys), cache), strict=True)
        )
        y = F.scaled_dot_product_attention(heads, keys, values, mask(number, bucket), scale=op.scale)
        y = y.transpose(1, 2).reshape(b * n, -1)
        made[bucket.tokens] = y if bucket.real is None else y[bucket.real]
    return made


def buckets_of(distance: Tensor, count: int, longest: int, *, both_sides: bool) -> Tensor:
    """Return the bucket of each distance: see `program.encoded.buckets_of`."""
    table = _buckets(count, longest, both_sides, distance.device)
    return table[distance.clamp(-longest, longest) + longest]  # longer distances share a side's last bucket


@cache
def _buckets(count: int, longest: int, both_sides: bool, device: torch.device) -> Tensor:
    """Return the buckets of the distances from -`longest` to `longest`."""
    distances = np.arange(-longest, longest + 1)
    return torch.from_numpy(encoded.buckets_of(distances, count, longest, both_sides=both_sides)).to(device)
