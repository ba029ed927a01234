"""Codes of matrices in FP8: made of 16 bits, and brought into the order of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.backends.cuda.products.fp8_shapes import BLOCK

LARGEST = 448.0  # of e4m3
_AT_ONCE = 1 << 23  # numbers quantized at a time: 32 bits each, in two copies


def interleaved(codes: Tensor) -> Tensor:
    """Return bytes (rows, columns) with the halves of each 128 columns interleaved, padded with zeros to whole 128."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % BLOCK))
    return padded.view(len(codes), -1, 2, BLOCK // 2).transpose(2, 3).reshape(padded.shape).contiguous()


def quantized(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to bytes of e4m3 with a scale for each row, (rows, 1) float32, so that its largest is 448."""
    codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
    scale = torch.empty(len(matrix), 1, device=matrix.device)
    largest = torch.full((1, 1), LARGEST, device=matrix.device)  # by a number, torch multiplies with its reciprocal
    at_once = max(1, _AT_ONCE // matrix.shape[1])
    for first in range(0, len(matrix), at_once):
        some = slice(first, first + at_once)
        wide = matrix[some].float()
        scale[some] = wide.abs().amax(1, keepdim=True).clamp_min_(1e-30) / largest
        wide = wide.div_(scale[some]).clamp_(-LARGEST, LARGEST)
        codes[some] = wide.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, scale
