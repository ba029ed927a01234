"""Kernels of the operations that keep a state per sequence. `kinds.py` has the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenmill.backends.torch.states import convolve, scan, steps_of
from tokenmill.program import recurrence

if TYPE_CHECKING:
    from tokenmill.backends.torch.kinds import StepState


def causal_conv(op: recurrence.CausalConv, step: StepState, x: Tensor) -> Tensor:
    """Convolve each row's tokens after the last inputs of its slot."""
    out, spec = torch.empty_like(x), op.state()
    weight, bias = step.weights[op.weight], step.optional(op.bias)
    for group in step.plan.groups:
        y, inputs = convolve(step.states.read(spec, group), x[group.tokens], weight, bias)
        step.states.write(spec, group, inputs)
        out[group.tokens] = y
    return out


def state_space(op: recurrence.StateSpace, step: StepState, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Continue the scan of each row from the state of its slot."""
    out, spec = torch.empty_like(x), op.state()
    heads, width, columns = spec.shape
    decay = -step.weights[op.a_log].float().exp()
    d = step.weights[op.d].float()[:, None]
    for group in step.plan.groups:
        size = group.tokens.shape
        xs = x[group.tokens].float().view(*size, heads, width)
        bs, cs = (v[group.tokens].float().view(*size, op.groups, columns) for v in (b, c))
        steps = steps_of(dt[group.tokens], step.optional(op.dt_bias), op.limits)
        y, state = scan(xs, steps, decay, bs, cs, step.states.read(spec, group))
        step.states.write(spec, group, state)
        out[group.tokens] = (y + d * xs).to(x.dtype).flatten(2)
    return out
