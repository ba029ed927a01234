"""Routing rows to experts, and the products of the chosen ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokenmill.program import ops
from tokenmill.program.ops import Weight


def routed(op: ops.Route, logits: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the ids of the chosen experts and their factors, each (rows, top_k), from float32 `logits`."""
    if op.score == "sparsemixer":
        ids, factors = _sparsemixer(op, logits)
    else:
        scores = logits.sigmoid() if op.score == "sigmoid" else logits.softmax(-1)
        choice = scores if correction is None else scores + correction
        if op.groups > 1:
            choice = _in_best_groups(op, choice)
        ids = choice.topk(op.top_k, -1).indices
        factors = scores.gather(-1, ids)
    if op.renormalize:
        factors = factors / factors.sum(-1, keepdim=True).clamp(min=op.least_sum)
    return ids, factors * op.scale


def _in_best_groups(op: ops.Route, choice: Tensor) -> Tensor:
    """Return the scores with minus infinity for the experts of all but the best groups."""
    grouped = choice.view(len(choice), op.groups, -1)
    best = grouped.topk(op.group_best, -1).values.sum(-1).topk(op.top_groups, -1).indices
    chosen = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, best, True)
    return grouped.masked_fill(~chosen[..., None], -torch.inf).flatten(1)


def _sparsemixer(op: ops.Route, logits: Tensor) -> tuple[Tensor, Tensor]:
    ids, factors, left = [], [], logits
    for _ in range(op.top_k):
        best, chosen = left.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * op.margin
        factors.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, chosen))
        ids.append(chosen)
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(ids, -1), torch.cat(factors, -1)


def mixed(
    op: ops.Experts,
    x: Tensor,
    ids: Tensor,
    factors: Tensor,
    weights: dict[Weight, Tensor],
    act: Callable[[Tensor], Tensor],
    first: int = 0,
) -> Tensor:
    """Return the sum of the chosen experts' outputs. Experts that no row chose are not run.

    `first`: id of the first expert that the rank has; it leaves out those that it has not.
    """
    out = torch.zeros_like(x)
    for e in sorted({e - first for e in ids.flatten().tolist()} & set(range(len(op.down)))):
        row, place = (ids == e + first).nonzero(as_tuple=True)
        factor = factors[row, place, None].to(x.dtype)
        rows = x[row] * factor if op.scale_inputs else x[row]
        bias, down_bias = (weights[some[e]] if some else None for some in (op.gate_up_bias, op.down_bias))
        inner = F.linear(rows, weights[op.gate_up[e]], bias)
        if op.gated:
            gate, up = inner.chunk(2, -1)
            if op.limit:
                gate, up = gate.clamp(max=op.limit), up.clamp(-op.limit, op.limit)
            inner = act(gate) * (up + op.up_offset)
        else:
            inner = act(inner)
        y = F.linear(inner, weights[op.down[e]], down_bias)
        out.index_add_(0, row, y if op.scale_inputs else y * factor)
    return out
