"""Kernels of the operations that keep a state per sequence. `states.py` has the states and the sums."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.backends.torch.states import StatePlan, convolve, scan, steps_of
from tokenmill.program import recurrence
from tokenmill.program.ops import Weight

Weights = dict[Weight, Tensor]


def causal_conv(op: recurrence.CausalConv, plan: StatePlan, weights: Weights, x: Tensor) -> Tensor:
    """Convolve each row's tokens after the last inputs of its slot."""
    out, spec = torch.empty_like(x), op.state()
    bias = None if op.bias is None else weights[op.bias]
    for group in plan.groups:
        out[group.tokens], inputs = convolve(plan.read(spec, group), x[group.tokens], weights[op.weight], bias)
        plan.write(spec, group, inputs)
    return out


def state_space(
    op: recurrence.StateSpace, plan: StatePlan, weights: Weights, x: Tensor, dt: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    """Continue the scan of each row from the state of its slot."""
    out, spec = torch.empty_like(x), op.state()
    heads, width, columns = spec.shape
    decay, d = -weights[op.a_log].float().exp(), weights[op.d].float()[:, None]
    bias = None if op.dt_bias is None else weights[op.dt_bias]
    for group in plan.groups:
        size = group.tokens.shape
        xs = x[group.tokens].float().view(*size, heads, width)
        bs, cs = (v[group.tokens].float().view(*size, op.groups, columns) for v in (b, c))
        steps = steps_of(dt[group.tokens], bias, op.limits)
        y, state = scan(xs, steps, decay, bs, cs, plan.read(spec, group))
        plan.write(spec, group, state)
        out[group.tokens] = (y + d * xs).to(x.dtype).flatten(2)
    return out
