"""Matrices of e4m3 codes and their products, with expected results from the definition of the format."""

from __future__ import annotations

from typing import Any

import numpy as np
from support_cuda import DEVICE, torch

from tokenmill.backends.cuda.products.base import Operands, Scratch
from tokenmill.backends.cuda.products.fp8 import Fp8
from tokenmill.quant.base import Coded

INEXACT = 6e-3  # FP8 tensor cores add with fewer bits than float32
SCALES = {"tensor": (0, 0), "row": (1, 0), "block": (128, 128)}


def coded(rows: int, columns: int, kind: str, seed: int = 0, input_scale: float | None = None) -> Coded:
    """Return random codes, none of them NaN, with scales of a kind."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 256, (rows, columns), dtype=np.uint8)
    codes[codes & 127 == 127] = 3
    block = SCALES[kind]
    shape = tuple(-(-size // each) if each else 1 for size, each in zip((rows, columns), block, strict=True))
    return Coded(codes, "e4m3", draw.uniform(0.5, 1.5, shape).astype(np.float32) / 400, block, input_scale=input_scale)


def packed(matrix: Coded, dtype: Any = torch.float16) -> Fp8:
    """Return a matrix on the device."""
    codes, scale = (torch.from_numpy(a.copy()).to(DEVICE) for a in (matrix.codes, matrix.scale))
    return Fp8(codes, scale, matrix.block, dtype, matrix.input_scale)


def made(matrix: Coded, x: Any, *, bias: Any = None, act: str = "", invariant: bool = False) -> tuple[Any, Any]:
    """Return the product of a matrix, and its output."""
    out = torch.full((len(x), matrix.shape[0]), 7.0, dtype=x.dtype, device=DEVICE)
    gated = torch.full((len(x), matrix.shape[0] // 2), 7.0, dtype=x.dtype, device=DEVICE) if act else None
    operands = Operands(x, out, bias, act, gated)
    product = packed(matrix, x.dtype).product(operands, Scratch(matrix.shape[0], torch.device(DEVICE)), invariant)
    return product, out if gated is None else gated


def rows_of(count: int, columns: int, seed: int = 1) -> Any:
    """Return random rows in float16."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=draw).half().to(DEVICE)


def decoded(x: Any, kind: str, input_scale: float | None = None) -> np.ndarray:
    """Return x as its codes and scales stand for it, by the definition of each kind."""
    wide = x.float().cpu().numpy()
    padded = np.pad(wide, ((0, 0), (0, -wide.shape[1] % 128)))
    groups = padded.reshape(len(wide), -1, 128) if kind == "block" else padded[:, None]
    most = np.maximum(np.abs(groups).max(-1, keepdims=True), np.float32(1e-12))
    scale, inverse = most / np.float32(448), np.float32(448) / most
    if input_scale is not None:
        scale = np.full((1, 1, 1), input_scale, np.float32)
        inverse = 1 / scale
    codes = torch.from_numpy(np.clip(groups * inverse, -448, 448)).to(torch.float8_e4m3fn)
    return (codes.double().numpy() * scale).reshape(padded.shape)[:, : wide.shape[1]]


def wanted(matrix: Coded, x: np.ndarray, bias: Any = None, act: bool = False) -> np.ndarray:
    """Return the product of the dequantized matrix, with silu(gate) · up of its halves if `act`."""
    y = x @ matrix.floats().astype(np.float64).T + (0 if bias is None else bias.double().cpu().numpy())
    gate, up = np.split(y, 2, -1) if act else (y, y)
    return gate / (1 + np.exp(-gate)) * up if act else y


def assert_near(found: Any, want: np.ndarray, tolerance: float = 1.5e-3) -> None:
    """Assert that the relative error is small."""
    off = np.linalg.norm(found.double().cpu().numpy() - want) / np.linalg.norm(want)
    assert off < tolerance, (off, found.shape)
