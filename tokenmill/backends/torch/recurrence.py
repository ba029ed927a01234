"""Kernels of the operations that keep a state per sequence. `states.py` has the states and the sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokenmill.backends.torch.states import StatePlan, convolve, correct, scan, steps_of
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


def delta_rule(
    op: recurrence.DeltaRule, plan: StatePlan, weights: Weights, v: Tensor, q: Tensor, k: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """Continue the delta rule of each row from the state of its slot."""
    out, spec = torch.empty_like(v), op.state()
    heads, columns, width = spec.shape
    speed, bias = -weights[op.a_log].float().exp(), weights[op.dt_bias]
    for group in plan.groups:
        size = group.tokens.shape
        qs, ks = (_unit(x[group.tokens].float().view(*size, -1, columns)) for x in (q, k))
        vs, rate = v[group.tokens].float().view(*size, heads, width), op.rate * b[group.tokens].float().sigmoid()
        steps = steps_of(a[group.tokens], bias).view(*size, heads, -1)
        y, state = correct(qs * columns**-0.5, ks, vs, steps * speed.view(-1, 1), rate, plan.read(spec, group))
        plan.write(spec, group, state)
        out[group.tokens] = y.to(v.dtype).flatten(2)
    return out


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def rg_lru(op: recurrence.RgLru, plan: StatePlan, weights: Weights, x: Tensor) -> Tensor:
    """Continue the recurrent unit of each row from the state of its slot."""
    out, spec = torch.empty_like(x), op.state()

    def gate(matrices: tuple[Weight, ...], bias: Weight) -> Tensor:
        heads = x.view(len(x), len(matrices), -1).transpose(0, 1)
        stacked = torch.stack([weights[matrix] for matrix in matrices])  # (heads, columns, columns)
        y = torch.baddbmm(weights[bias][:, None], heads, stacked.transpose(1, 2))
        return y.transpose(0, 1).reshape(x.shape).sigmoid()

    inputs = gate(op.input_gate, op.input_bias) * x
    logs = -8.0 * gate(op.recurrence_gate, op.recurrence_bias).float() * F.softplus(weights[op.a].float())
    decays, roots = logs.exp(), torch.sqrt(1 - (2 * logs).exp())
    for group in plan.groups:
        decay, root = decays[group.tokens], roots[group.tokens]
        root[:, 0].masked_fill_(group.fresh[:, None], 1)
        added, state = inputs[group.tokens].float() * root, plan.read(spec, group)
        y = torch.empty_like(added)
        for t in range(added.shape[1]):
            state = decay[:, t] * state + added[:, t]
            y[:, t] = state
        plan.write(spec, group, state)
        out[group.tokens] = y.to(x.dtype)
    return out
