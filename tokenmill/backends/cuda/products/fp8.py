"""Products with matrices of e4m3 codes, with scales of the matrix, of its rows, or of 128 × 128 numbers.

Up to WEIGHT_ONLY rows x stays in 16 bits, which reads as little and is more exact. Above, x is quantized, too: by the
kernel that computes it where `quantized.py` finds one, else by a launch of its own. FP8 tensor cores then multiply
codes by codes, in a kernel of ours or in the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenmill.backends.cuda.kernels.fp8 import codes_by_codes, few_weight_only
from tokenmill.backends.cuda.kernels.fp8_one import one_weight_only
from tokenmill.backends.cuda.kernels.fp8_rows import quantize_rows
from tokenmill.backends.cuda.launch import Site, ahead
from tokenmill.backends.cuda.products.base import Needs, Operands, Scratch
from tokenmill.backends.cuda.products.dense import FewShape
from tokenmill.backends.cuda.products.fp8_codes import interleaved, quantized
from tokenmill.backends.cuda.products.fp8_shapes import (
    BLOCK,
    OURS,
    OURS_BLOCKED,
    RAW_GATED,
    WEIGHT_ONLY,
    WEIGHT_ONLY_BLOCKED,
    OneShape,
    codes_shape,
    invariant_shape,
    one_shape,
    weight_only_shape,
)  # fmt: skip
from tokenmill.backends.cuda.shapes import power
from tokenmill.quant.base import Coded

Upload = Callable[[NDArray[Any]], Tensor]
CAPABILITY = (8, 9)
"""Least compute capability of tensor cores for FP8"""

Scales = Literal["row", "group", "given"]
"""Scales of x's codes: computed for each row, or for each 128 columns of a row, or one that the checkpoint states."""


class Codes(NamedTuple):
    """Codes of x, (rows, columns padded to 128) e4m3, and their scales: (rows,) float32, or (groups · rows,)."""

    codes: Tensor
    scale: Tensor


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if the device multiplies codes, and products have results of `dtype`."""
    able = device.type != "cuda" or torch.cuda.get_device_capability(device) >= CAPABILITY
    return able and dtype in (torch.bfloat16, torch.float16)


def packed(parts: Sequence[Coded], upload: Upload, dtype: torch.dtype, device: torch.device) -> Fp8 | None:
    """Return stacked matrices as one in FP8; None unless all are e4m3 with scales as they are here.

    `upload`: copies an array to the device.
    """
    if not supports(dtype, device) or not all(is_fp8(part) for part in parts):
        return None
    blocked = [part.block == (BLOCK, BLOCK) for part in parts]
    if any(blocked) and not (all(blocked) and all(part.shape[0] % BLOCK == 0 for part in parts[:-1])):
        return None
    given = [part.input_scale for part in parts if part.input_scale is not None]
    scales = [part.scale if blocked[0] else part.by_rows().scale for part in parts]
    return Fp8(
        torch.cat([upload(part.codes).view(torch.uint8) for part in parts]),
        torch.cat([upload(scale).float() for scale in scales if scale is not None]),
        parts[0].block if blocked[0] else (1, 0),
        dtype,
        max(given) if len(given) == len(parts) else None,
    )


def is_fp8(coded: Coded) -> bool:
    """Return True if a matrix has codes and scales as `Fp8` holds them."""
    others = coded.zero, coded.low, coded.order
    known = coded.block in ((0, 0), (1, 0), (BLOCK, BLOCK)) and coded.codes.ndim == 2
    return known and coded.format == "e4m3" and coded.scale is not None and all(other is None for other in others)


def made(matrix: Tensor) -> Fp8:
    """Return a matrix of 16 bits quantized to FP8 with a scale for each row."""
    return Fp8(*quantized(matrix), (1, 0), matrix.dtype)


class Fp8:
    """Implements `base.Packed`.

    `codes`: (rows, columns) bytes. `scale`: float32, for each block of `block` = (rows, columns), as in `Coded`.
    `dtype`: of the computation. `input_scale`: scale of x's codes; None: computed.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        block: tuple[int, int],
        dtype: torch.dtype,
        input_scale: float | None = None,
    ) -> None:
        self.rows, self.columns = codes.shape
        self.blocked, self.input_scale = block == (BLOCK, BLOCK), input_scale
        self.codes = interleaved(codes)
        self.scale = scale.contiguous() if self.blocked else scale.reshape(-1).expand(self.rows).contiguous()
        # A sum of products of codes exceeds float16, so x and the matrix are each multiplied by 2^-9 there.
        self.raw_factor = torch.full((), 2.0**-9 if dtype == torch.float16 else 1.0, device=codes.device)
        self.raw_scale = self.scale * 2.0**18 if dtype == torch.float16 else self.scale

    @property
    def nbytes(self) -> int:
        """See `Packed`."""
        return self.codes.nbytes + self.scale.nbytes

    @property
    def scales(self) -> Scales:
        """Scales of x's codes."""
        if self.blocked:
            return "group"
        return "row" if self.input_scale is None else "given"

    def needs(self, rows: int) -> Needs:
        """See `Packed`. Memory for codes is planned apart, in `quantized.py`."""
        return Needs()

    def codes_for(self, rows: int) -> Codes:
        """Return room for codes of so many rows of x. A scale that is given is set at once."""
        rows, padded = scale_stride(rows), self.codes.shape[1]
        codes = torch.zeros(rows, padded, dtype=torch.float8_e4m3fn, device=self.codes.device)
        each = padded // BLOCK if self.blocked else 1
        return Codes(codes, torch.full((rows * each,), self.input_scale or 1.0, device=self.codes.device))

    def product(self, operands: Operands, scratch: Scratch | None, batch_invariant: bool) -> Fp8Product:
        """See `Packed`."""
        return Fp8Product(self, operands, scratch, batch_invariant)


class Fp8Product:
    """Implements `base.Product`.

    `codes`: room for the codes of x; None: of its own. `given`: the kernel before stores them, where `reads_codes` is
    true. `leaves`: the kernel behind multiplies by the scales, where `raw` is true.
    """

    norms_one = True
    codes: Codes | None = None
    given = False
    leaves = False

    def __init__(self, matrix: Fp8, operands: Operands, scratch: Scratch | None, batch_invariant: bool) -> None:
        self._matrix, self._scratch, self._invariant = matrix, scratch, batch_invariant
        self._x, self._whole, self._bias, self._act, gated = operands
        self._out = self._whole if gated is None else gated
        self._outputs = matrix.rows // (2 if self._act else 1)
        self._real = self._x.device.type == "cuda"
        self._e4m3 = matrix.codes.view(torch.float8_e4m3fn)
        self._transposed = self._e4m3.t()
        self._one, self._few = Site(one_weight_only), Site(few_weight_only)
        self._codes, self._quantize = Site(codes_by_codes), Site(quantize_rows)
        self._descriptors: dict[tuple[int, int, int], tuple[TensorDescriptor, TensorDescriptor]] = {}
        self._words = self._in_words()

    def _in_words(self) -> tuple[Tensor, Tensor] | None:
        """Return x's first row and the matrix as words of 32 bits; None if x does not consist of words."""
        x = self._x[0]
        if x.dtype.itemsize != 2 or len(x) % 2 or x.storage_offset() % 2 or x.stride(0) != 1:
            return None
        return x.view(torch.int32), self._matrix.codes.view(torch.int32)

    # ---- decisions ----

    @property
    def fuses_one(self) -> bool:
        """See `Product`."""
        if self._act and self._matrix.blocked:
            return False  # Scales of two blocks cost more than a launch of the norm.
        fits = one_shape(self._outputs, self._matrix.columns, bool(self._act)) is not None
        return not self._invariant and self._words is not None and fits

    def reads_codes(self, rows: int) -> bool:
        """Return True if x is quantized for a product of so many rows."""
        return self._invariant or rows > (WEIGHT_ONLY_BLOCKED if self._matrix.blocked else WEIGHT_ONLY)

    def raw(self, rows: int) -> bool:
        """Return True if `run` leaves the multiplication by the scales of rows and columns to the kernel behind."""
        fits = self.leaves and self.reads_codes(rows) and self._library and not self._matrix.blocked
        return fits and not (self._act and rows > RAW_GATED and self._scales_in_library)

    @property
    def raw_scales(self) -> tuple[Tensor, Tensor]:
        """Scales of x's rows and of the columns of the result."""
        return self._read_codes().scale, self._matrix.raw_scale

    def applies_act(self, rows: int) -> bool:
        """See `Product`."""
        if not self._act or not self._whole_halves:
            return False
        return not self.leaves and rows <= self._ours if self.reads_codes(rows) else self._scratch is not None

    @property
    def _ours(self) -> int:
        """Number of rows up to which a kernel of ours multiplies codes."""
        return OURS_BLOCKED if self._matrix.blocked else OURS

    @property
    def _scales_in_library(self) -> bool:
        """True if the library's products of this dtype can have scales of rows."""
        return self._whole.dtype == torch.bfloat16

    @property
    def _whole_halves(self) -> bool:
        """True unless a block of scales belongs to both halves of a gated matrix."""
        return not (self._act and self._matrix.blocked and self._outputs % BLOCK)

    @property
    def _library(self) -> bool:
        """True if the library multiplies codes of this shape."""
        matrix = self._matrix
        if self._invariant or matrix.rows % 16:
            return False
        if not matrix.blocked:
            return True
        fits = matrix.rows % BLOCK == 0 and matrix.scale.shape[1] % 4 == 0
        return fits and self._real and torch.cuda.get_device_capability(self._x.device) == (9, 0)

    # ---- launches ----

    def run(self, rows: int, early: bool = False) -> None:
        """See `Product`."""
        if not self.reads_codes(rows):
            if rows == 1 and self.fuses_one:
                self.one(early=early)
            else:
                self.run_weight_only(rows, early)
            return
        if not self.given:
            self.quantize(rows, early)
        if self.raw(rows):
            self.run_raw(rows)
        elif self._library and rows > self._ours and self.run_scaled(rows):
            if self._bias is not None:
                self._whole[:rows].add_(self._bias)
        else:
            self.run_codes(rows, early)

    def quantize(self, rows: int, early: bool) -> None:
        """Launch the quantization of x."""
        columns, codes = self._x.shape[1], self._read_codes()
        self._quantize(
            (rows,),
            self._x, codes.codes, codes.scale, self._x.stride(0), scale_stride(rows), WIDTH=columns,
            KP=codes.codes.shape[1], BLOCK=power(codes.codes.shape[1]), SCALES=self._matrix.scales, PDL=early,
            num_warps=row_warps(columns), **ahead(early),
        )  # fmt: skip

    def _read_codes(self) -> Codes:
        if self.codes is None:
            self.codes = self._matrix.codes_for(len(self._x))
        return self.codes

    def run_raw(self, rows: int) -> None:
        """Launch the library's product without scales."""
        self._multiply(rows, self._matrix.raw_factor, self._matrix.raw_factor)

    def _multiply(self, rows: int, x_scale: Tensor, scale: Tensor) -> None:
        torch._scaled_mm(
            self._read_codes().codes[:rows], self._transposed, x_scale, scale, out_dtype=self._whole.dtype,
            use_fast_accum=not self._matrix.blocked, out=self._whole[:rows],
        )  # fmt: skip

    def run_scaled(self, rows: int) -> bool:
        """Launch the library's product with scales; return False if it has none for so many rows."""
        if not self._scales_in_library:
            return False
        codes = self._read_codes()
        if not self._matrix.blocked:
            self._multiply(rows, codes.scale[:rows, None], self._matrix.scale[None])
            return True
        rows = scale_stride(rows)  # The rows that are too many hold what earlier steps left.
        if rows > len(self._whole):
            return False
        groups = self._matrix.scale.shape[1]
        scale = codes.scale[: groups * rows].view(groups, rows).t()
        self._multiply(rows, scale, self._matrix.scale.t())
        return True

    def run_weight_only(self, rows: int, early: bool, shape: FewShape | None = None) -> None:
        """Launch few rows in 16 bits. `shape`: None for the sizes chosen by the matrix."""
        matrix, gated = self._matrix, bool(self._act) and self.applies_act(rows)
        outputs = self._outputs if gated else matrix.rows
        shape = shape or weight_only_shape(rows, outputs, matrix.columns, gated)
        part, counts = self._split_room()
        self._few(
            (triton.cdiv(outputs, shape.outputs), shape.splits),
            self._x, matrix.codes.view(torch.int16), matrix.scale, self._bias_or_scale, self._out_of(gated), part,
            counts, self._x.stride(0), rows, N=outputs, K=matrix.columns, KP=matrix.codes.shape[1],
            BM=next(tile for tile in (8, 16, 32) if rows <= tile), BN=shape.outputs, SPLITS=shape.splits,
            BLOCKED=matrix.blocked, BIAS=self._bias is not None, ACT=self._act if gated else "", ASM=self._real,
            PDL=early, STAGES=shape.stages, num_warps=shape.warps, **ahead(early),
        )  # fmt: skip

    def run_codes(self, rows: int, early: bool, shape: FewShape | None = None) -> None:
        """Launch rows whose codes are there. `shape`: None for the sizes chosen by the matrix."""
        matrix, gated, codes = self._matrix, self.applies_act(rows), self._read_codes()
        outputs = self._outputs if gated else matrix.rows
        shape = shape or self._codes_shape(rows, outputs, gated)
        tile = next((tile for tile in (16, 32, 64) if rows <= tile), 128)
        x, weight = codes.codes, self._e4m3
        tma = shape.tma and self._scratch is not None and self._scratch.tma
        if tma:
            x, weight = self._described(codes, tile, shape)
        part, counts = self._split_room()
        self._codes(
            (triton.cdiv(outputs, shape.outputs), shape.splits, triton.cdiv(rows, tile)),
            x, weight, codes.scale, matrix.scale, self._bias_or_scale, self._out_of(gated), part, counts, rows,
            scale_stride(rows), N=outputs, KP=matrix.codes.shape[1], BM=tile, BN=shape.outputs, BK=shape.columns,
            SPLITS=shape.splits, BLOCKED=matrix.blocked, BIAS=self._bias is not None, ACT=self._act if gated else "",
            TMA=tma, PDL=early, STAGES=shape.stages, num_warps=shape.warps, **ahead(early),
        )  # fmt: skip

    def _codes_shape(self, rows: int, outputs: int, gated: bool) -> FewShape:
        if self._invariant:
            return invariant_shape(rows, self._matrix.blocked)
        shape = codes_shape(rows, outputs, self._matrix.codes.shape[1], gated, self._matrix.blocked)
        return shape._replace(splits=1) if self._scratch is None else shape

    def _described(self, codes: Codes, tile: int, shape: FewShape) -> tuple[TensorDescriptor, TensorDescriptor]:
        """Return the copy engine's descriptors of codes, made once because addresses stay."""
        key = tile, shape.outputs, shape.columns
        if key not in self._descriptors:
            self._descriptors[key] = (
                TensorDescriptor.from_tensor(codes.codes, [tile, shape.columns]),
                TensorDescriptor.from_tensor(self._e4m3, [shape.outputs, shape.columns]),
            )
        return self._descriptors[key]

    @property
    def _bias_or_scale(self) -> Tensor:
        return self._matrix.scale if self._bias is None else self._bias

    def _out_of(self, gated: bool) -> Tensor:
        return self._out if gated else self._whole

    def _split_room(self) -> tuple[Tensor, Tensor]:
        if self._scratch is None:
            return self._matrix.scale, self._matrix.scale
        return self._scratch.part, self._scratch.counts

    def one(
        self,
        norm: tuple[Tensor, Tensor, float] | None = None,
        residual: tuple[Tensor, Tensor] | None = None,
        early: bool = False,
        shape: OneShape | None = None,
    ) -> None:
        """See `Product`. `shape`: None for the sizes chosen by the matrix."""
        matrix = self._matrix
        shape = shape or one_shape(self._outputs, matrix.columns, bool(self._act))
        assert shape is not None
        assert self._words is not None
        words, codes = self._words
        norm_weight, eps = words, 0.0
        if norm is not None:
            words, norm_weight, eps = norm[0][0].view(torch.int32), norm[1].view(torch.int32), norm[2]
        added, out = residual or (self._whole, self._out)
        self._one(
            (triton.cdiv(self._outputs, shape.outputs),),
            words, codes, matrix.scale, norm_weight, self._bias_or_scale, added, out, eps, N=self._outputs,
            K=matrix.columns, BN=shape.outputs, BW=shape.words, BLOCKED=matrix.blocked, NORM=norm is not None,
            BIAS=self._bias is not None, RESIDUAL=residual is not None, ACT=self._act, PDL=early, STAGES=shape.stages,
            num_warps=shape.warps, **ahead(early),
        )  # fmt: skip


def row_warps(columns: int) -> int:
    """Return the warps of a kernel that holds a row of so many columns."""
    return min(32, max(4, power(columns) // 1024))


def scale_stride(rows: int) -> int:
    """Return the distance of a group's scales from those of the next: the library requires a multiple of 4."""
    return -(-rows // 4) * 4
