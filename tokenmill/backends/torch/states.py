"""States of fixed size by slot, and the operations that keep them.

A slot has a ring of `STATE_RING` states: the one after p tokens is at place p % STATE_RING. The engine may compute a
sequence's last position again, because the token after it was replaced; the state before that position is still there.

B rows of a group, which have n tokens each; H heads, P columns of a head, N columns of a state, G groups of heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.base import StepInputs
from tokenmill.backends.rings import RingProgress
from tokenmill.backends.steps import STATE_RING
from tokenmill.program.keeps import StateSpec

CHUNK = 64  # tokens of a prompt that are computed at once
Key = tuple[int, str]
"""Layer and name of a state."""


@dataclass(slots=True)
class Group:
    """Rows of a step with the same number of tokens."""

    tokens: Tensor  # (B, n) indices among the step's tokens
    slots: Tensor  # (B,)
    source: Tensor  # (B,) place in the ring of the state before the first token
    target: Tensor  # (B,) place of the state after the last token
    fresh: Tensor  # (B,) true for rows that begin at position 0


@dataclass(slots=True)
class StatePlan:
    """Groups of a step, shared by all operations, and the states that they continue from."""

    groups: list[Group]
    rings: dict[Key, Tensor]

    def read(self, spec: StateSpec, group: Group) -> Tensor:
        """Return the states (B, …) before the first tokens of a group: zeros at position 0."""
        states = self.rings[spec.key][group.slots, group.source]
        return states.masked_fill_(group.fresh.view(-1, *[1] * (states.dim() - 1)), 0)

    def write(self, spec: StateSpec, group: Group, states: Tensor) -> None:
        """Keep the states (B, …) after the last tokens of a group."""
        ring = self.rings[spec.key]
        ring[group.slots, group.target] = states.to(ring.dtype)


class States:
    """The states of all slots. Only the backend's thread uses it."""

    def __init__(
        self, layout: Mapping[Key, StateSpec], num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layout, self._device, self._dtype = layout, device, dtype
        self._rings: dict[Key, Tensor] = {}
        self._progress = RingProgress(num_slots)

    def allocate(self) -> None:
        """Make the states of all slots."""
        for key, spec in self._layout.items():
            dtype = torch.float32 if spec.dtype == "float32" else self._dtype
            self._rings[key] = zeros((len(self._progress.after), STATE_RING, *spec.shape), dtype, self._device)

    def clear(self) -> None:
        """Drop the states of the warm-up's slot."""
        self._progress.clear(0)
        for ring in self._rings.values():
            ring[0].zero_()

    def plan(self, inputs: StepInputs) -> StatePlan:
        """Plan a step, whose rows must continue where their slots' states are."""
        if not self._layout:
            return StatePlan([], self._rings)
        counts = inputs.counts.astype(np.int64)
        firsts = np.cumsum(counts) - counts
        slots, starts = inputs.slots.astype(np.int64), inputs.starts.astype(np.int64)
        ends = starts + counts
        self._progress.advance(inputs)
        return StatePlan(
            [self._group(firsts, slots, starts, ends, counts == n, int(n)) for n in np.unique(counts)], self._rings
        )

    def _group(self, firsts: _Ints, slots: _Ints, starts: _Ints, ends: _Ints, rows: _Bools, count: int) -> Group:
        def tensor(array: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(array).to(self._device)

        return Group(
            tensor(firsts[rows][:, None] + np.arange(count)),
            tensor(slots[rows]),
            tensor(starts[rows] % STATE_RING),
            tensor(ends[rows] % STATE_RING),
            tensor(starts[rows] == 0),
        )


_Ints = NDArray[np.int64]
_Bools = NDArray[np.bool_]


def convolve(before: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Convolve x (B, n, C) after the inputs `before` (B, K - 1, C) with `weight` (C, K). Return that and new inputs."""
    taps, count = weight.shape[1], x.shape[1]
    both = torch.cat((before, x), 1)
    out = both[:, :count] * weight[:, 0]
    for tap in range(1, taps):
        out += both[:, tap : tap + count] * weight[:, tap]
    return out if bias is None else out + bias, both[:, count:]


def scan(x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs (B, n, H, P) and the last state (B, H, P, N) of a recurrence.

    x (B, n, H, P), step (B, n, H), decay: logarithm per unit of step, (H,) or (H, N), b and c (B, n, G, N),
    state (B, H, P, N). All of float32.
    """
    if x.shape[1] > 1 and decay.dim() == 1:
        parts = []
        for first in range(0, x.shape[1], CHUNK):
            some = slice(first, first + CHUNK)
            part, state = _chunk(x[:, some], step[:, some], decay, b[:, some], c[:, some], state)
            parts.append(part)
        return torch.cat(parts, 1), state
    heads = x.shape[2]
    out = torch.empty_like(x)
    added = x * step[..., None]
    for t in range(x.shape[1]):
        kept = torch.exp(step[:, t, :, None] * (decay if decay.dim() == 2 else decay[:, None]))  # (B, H, N or 1)
        state = state * kept[:, :, None] + added[:, t, :, :, None] * _each(b[:, t], heads)[:, :, None]
        out[:, t] = (state * _each(c[:, t], heads)[:, :, None]).sum(-1)
    return out, state


def _chunk(x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `scan` returns, for a decay of whole heads: all tokens at once, as attention with a decaying mask."""
    heads = x.shape[2]
    added = x * step[..., None]
    b, c = (_each(v, heads, 2) for v in (b, c))  # (B, n, H, N)
    total, between = _decays(step * decay)
    scores = torch.einsum("bihn,bjhn->bhij", c, b) * between
    out = torch.einsum("bhij,bjhp->bihp", scores, added)
    out += torch.einsum("bihn,bhpn,bhi->bihp", c, state, total.exp())
    left = (total[..., -1:] - total).exp()  # (B, H, n)
    grown = torch.einsum("bjhp,bjhn,bhj->bhpn", added, b, left)
    return out, state * total[..., -1].exp()[..., None, None] + grown


def _each(v: Tensor, heads: int, dim: int = 1) -> Tensor:
    """Return v with the group of each head in dimension `dim`."""
    return v if v.shape[dim] in (1, heads) and dim == 1 else v.repeat_interleave(heads // v.shape[dim], dim)


def correct(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs (B, n, H, P) and the last state (B, H, N, P) of the delta rule.

    q, k (B, n, G, N), v (B, n, H, P), decay: logarithms, (B, n, H, 1 or N), rate (B, n, H), state (B, H, N, P). All of
    float32.
    """
    heads = v.shape[2]
    q, k = (_each(x, heads, 2) for x in (q, k))
    if v.shape[1] > 1 and decay.shape[-1] == 1:
        parts = []
        for first in range(0, v.shape[1], CHUNK):
            some = slice(first, first + CHUNK)
            part, state = _correct_chunk(q[:, some], k[:, some], v[:, some], decay[:, some, :, 0], rate[:, some], state)
            parts.append(part)
        return torch.cat(parts, 1), state
    out = torch.empty_like(v)
    for t in range(v.shape[1]):
        state = state * decay[:, t].exp()[..., None]
        error = (v[:, t] - torch.einsum("bhn,bhnp->bhp", k[:, t], state)) * rate[:, t, :, None]
        state = state + k[:, t, :, :, None] * error[:, :, None]
        out[:, t] = torch.einsum("bhn,bhnp->bhp", q[:, t], state)
    return out, state


def _correct_chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `correct` returns, for a decay of whole heads, (B, n, H): the corrections solve a linear system."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, n, …)
    total, between = _decays(decay)
    rate = rate.transpose(1, 2)[..., None]
    grown = total.exp()[..., None]
    system = (k @ k.transpose(-1, -2) * between * rate).tril(-1)  # and ones on the diagonal
    errors = torch.linalg.solve_triangular(system, rate * (v - grown * (k @ state)), upper=False, unitriangular=True)
    out = grown * (q @ state) + (q @ k.transpose(-1, -2) * between) @ errors
    left = (total[..., -1:] - total).exp()[..., None]
    state = state * grown[..., -1:, :] + (k * left).transpose(-1, -2) @ errors
    return out.transpose(1, 2), state


def _decays(decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the decay up to each token, (B, H, n), and the decay between two, (B, H, n, n)."""
    total, count = decay.cumsum(1).transpose(1, 2), decay.shape[1]
    late = torch.ones(count, count, dtype=torch.bool, device=decay.device).triu(1)
    return total, (total[..., None] - total[:, :, None]).masked_fill(late, -math.inf).exp()


def steps_of(dt: Tensor, bias: Tensor | None, limits: tuple[float, float] = (0.0, math.inf)) -> Tensor:
    """Return softplus(dt + bias), clamped."""
    step = F.softplus(dt.float() if bias is None else dt.float() + bias.float())
    return step if limits == (0.0, math.inf) else step.clamp(*limits)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `torch.zeros`, on a CPU without touching the pages: a large cache does not slow the start."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
