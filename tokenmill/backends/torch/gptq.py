"""Rounding of a matrix to 4 bits by GPTQ (arXiv:2210.17323).

Columns are rounded one after another, and the error of each is spread over the columns that follow, so that products
with the calibration's activations change least. `hessian` is the sum of xᵀ · x over these activations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenmill.errors import ModelError

_BITS, _ZERO = 4, 8
_LAST = (1 << _BITS) - 1
_TRIES = 6  # to invert, each with ten times the damping


class Recipe(NamedTuple):
    """User options of the method."""

    group: int = 128  # inputs that share a scale; 0: all
    act_order: bool = False  # round the inputs with the largest activations first
    damping: float = 0.01  # share of the diagonal's mean that is added to the diagonal


class Rounded(NamedTuple):
    """Rounded matrix: the number of a code is scale[group] · (code − 8)."""

    codes: Tensor  # (outputs, inputs), uint8
    scale: Tensor  # (outputs, groups), float16
    group_of: Tensor  # (inputs,), int64: the group of each input
    numbers: Tensor  # (outputs, inputs), in the dtype of the matrix


def rounded(weight: Tensor, hessian: Tensor, recipe: Recipe) -> Rounded:
    """Round a matrix (outputs, inputs). `hessian`: (inputs, inputs), float32; both are left as they are.

    Raises ModelError if the activations have no finite numbers.
    """
    inputs, unused = weight.shape[1], hessian.diagonal() == 0
    order = torch.arange(inputs, device=weight.device)
    if recipe.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    w = weight.float().T[order].contiguous()  # (inputs, outputs): what is rounded at a time is adjacent in memory
    w[unused[order]] = 0
    factor = _factor(hessian[order][:, order], unused[order], recipe.damping)
    group = recipe.group or inputs
    codes, scales = torch.empty_like(w, dtype=torch.uint8), []
    for start in range(0, inputs, group):
        stop = min(start + group, inputs)
        some, own = w[start:stop], factor[start:stop, start:stop]
        scale, errors = _scale(some), torch.empty_like(some)
        for i in range(stop - start):
            code = (some[i] / scale).round_().add_(_ZERO).clamp_(0, _LAST)
            errors[i] = (some[i] - (code - _ZERO) * scale) / own[i, i]
            some[i + 1 :].addr_(own[i, i + 1 :], errors[i], alpha=-1)
            codes[start + i] = code
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        scales.append(scale)
    back = order.argsort()
    group_of, scale = torch.arange(inputs, device=w.device)[back] // group, torch.stack(scales, 1)
    codes = codes[back].T.contiguous()
    numbers = (codes.float() - _ZERO) * scale[:, group_of]
    return Rounded(codes, scale.half(), group_of, numbers.to(weight.dtype))


def _scale(w: Tensor) -> Tensor:
    """Return the scale of each output, a number of float16, which covers its largest magnitude on both sides."""
    scale = w.abs().amax(0) * (2 / _LAST)
    return scale.clamp(2.0**-24, 65504).half().float()


def _factor(hessian: Tensor, unused: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped hessian."""
    diagonal = torch.where(unused, 1.0, hessian.diagonal())
    for attempt in range(_TRIES):
        damped = hessian.clone()
        damped.diagonal().copy_(diagonal + damping * 10**attempt * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(torch.isfinite(factor).all()):
            return factor
    raise ModelError(
        "The activations of the calibration text are no finite numbers, or their products cannot be inverted. Give "
        "another text, or a larger --percdamp."
    )
