"""Operations of single architectures: a function for each kind, as in `kinds.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokenmill.backends.torch.step_state import StepState
from tokenmill.program import ops, special


def scale_by_position(op: special.ScaleByPosition, step: StepState, x: Tensor) -> Tensor:
    """Return x times a factor that grows with the position."""
    factor = 1 + op.beta * torch.log1p(torch.floor((step.positions + op.offset) / op.length))
    return x * factor[:, None].to(x.dtype)


def xielu(op: special.XIelu, step: StepState, x: Tensor) -> Tensor:
    """Return xIELU, with the constants of its authors."""
    beta, eps = 0.5, -1e-6
    above = F.softplus(step.weights[op.alpha_p])
    below = beta + F.softplus(step.weights[op.alpha_n])
    return torch.where(x > 0, above * x * x, (torch.expm1(x.clamp(max=eps)) - x) * below) + beta * x


def clip(op: special.Clip, step: StepState, x: Tensor) -> Tensor:
    """Return x within bounds."""
    return x.clamp(-op.limit, op.limit)


def scale_by_weight(op: special.ScaleByWeight, step: StepState, x: Tensor) -> Tensor:
    """Return x times a number for each column, or one for all."""
    return x * step.weights[op.weight]


def scale_by_expert(op: special.ScaleByExpert, step: StepState, factors: Tensor, ids: Tensor) -> Tensor:
    """Return the factors times the numbers of their experts."""
    return factors * step.weights[op.weight][ids]


def within(op: special.Within, step: StepState, ids: Tensor) -> Tensor:
    """Return the ids, with 0 for those of no row."""
    return ids * (ids < op.rows)


def moments(op: special.Moments, step: StepState, x: Tensor) -> Tensor:
    """Return the sums of each row and of its squares, in float32."""
    x = x.float()
    return torch.stack([x.sum(-1), x.square().sum(-1)], -1) * op.share


def norm_of_share(op: special.NormOfShare, step: StepState, x: Tensor, moments: Tensor) -> Tensor:
    """Return the norm of a part of a row."""
    y = (x.float() * torch.rsqrt(moments[:, 1:] / op.columns + op.eps)).to(x.dtype)
    return y if op.weight is None else y * step.weights[op.weight]


def sparsify(op: special.Sparsify, step: StepState, x: Tensor, moments: Tensor | None = None) -> Tensor:
    """Return what exceeds a threshold that few columns of a row exceed."""
    if moments is None:
        deviation, mean = torch.std_mean(x, -1, correction=0, keepdim=True)
    else:
        mean, squares = (moments / op.columns).chunk(2, -1)
        deviation = (squares - mean.square()).clamp(min=0).sqrt()
    return F.relu(x - (mean + deviation * op.deviations).to(x.dtype))


def with_magnitude(op: special.WithMagnitude, step: StepState, x: Tensor, like: Tensor) -> Tensor:
    """Return parts of x with the magnitude of another value."""
    parts = x.view(len(x), -1, like.shape[1])
    wanted = like.square().mean(-1).sqrt()[:, None, None]
    own = parts.square().mean(-1, keepdim=True).clamp(min=op.least**2).sqrt()
    return (parts * wanted / own).flatten(1)


def beside(op: special.Beside, step: StepState, x: Tensor, y: Tensor) -> Tensor:
    """Return x and y as one row."""
    return torch.cat([x, y], -1)


def mix_streams(op: special.MixStreams, step: StepState, x: Tensor, factors: Tensor) -> Tensor:
    """Return each stream plus a sum of all."""
    streams = int(factors.shape[1] ** 0.5)
    parts = x.view(len(x), streams, -1)
    return (parts + factors.view(len(x), streams, streams) @ parts).flatten(1)


def correct_streams(op: special.CorrectStreams, step: StepState, x: Tensor, y: Tensor, factors: Tensor) -> Tensor:
    """Return each stream plus its share of what is new in the first."""
    parts = x.view(len(x), factors.shape[1], -1)
    return (parts + (1 + factors)[..., None] * (y - parts[:, 0])[:, None]).flatten(1)


def add_to_others(op: special.AddToOthers, step: StepState, x: Tensor, y: Tensor) -> Tensor:
    """Return the streams, with y added to all but the first."""
    first, others = x[:, : y.shape[1]], x[:, y.shape[1] :].view(len(x), -1, y.shape[1])
    return torch.cat([first, (others + y[:, None]).flatten(1)], -1)


KERNELS: dict[type[ops.Op], Callable[..., Any]] = {
    special.ScaleByPosition: scale_by_position,
    special.XIelu: xielu,
    special.Clip: clip,
    special.ScaleByWeight: scale_by_weight,
    special.ScaleByExpert: scale_by_expert,
    special.Within: within,
    special.Moments: moments,
    special.NormOfShare: norm_of_share,
    special.Sparsify: sparsify,
    special.WithMagnitude: with_magnitude,
    special.Beside: beside,
    special.MixStreams: mix_streams,
    special.CorrectStreams: correct_streams,
    special.AddToOthers: add_to_others,
}
