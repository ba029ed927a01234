"""Measure products with FP8 matrices on a GPU: the four of a layer of the 8B shape, in microseconds beside floors.

    python3 -m bench.gpu.fp8                      all matrices, with variants of sizes
    python3 -m bench.gpu.fp8 --rows 1,64 --only down

Results are compared with float32 first. Each figure is of launches in a CUDA graph, over so many copies of the matrix
that none is in the cache. The floor is the larger of reading codes at 4.4 TB/s, and the products at 1,979 TFLOP/s. The
best variants are copied by hand into `products/fp8_shapes.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from bench.gpu.timing import graph_us, off
from tokenmill.backends.cuda.compile import Kernels
from tokenmill.backends.cuda.products.base import FEW, Operands, Scratch
from tokenmill.backends.cuda.products.dense import DenseProduct, FewShape
from tokenmill.backends.cuda.products.fp8 import Fp8, Fp8Product, made
from tokenmill.backends.cuda.products.fp8_shapes import OneShape

_BYTES_S, _FLOPS_S = 4.4e12, 1979e12
_COLD = 400e6  # bytes of copies of a matrix
_ROWS = "1,8,16,32,64,128,256,2048,8192"


class Matrix(NamedTuple):
    """Sizes of a matrix. `act`: of the activation behind it."""

    rows: int
    columns: int
    act: str = ""


MATRICES = {
    "qkv": Matrix(6144, 4096), "o": Matrix(4096, 4096), "gate_up": Matrix(28672, 4096, "silu"),
    "down": Matrix(4096, 14336),
}  # fmt: skip
_ONE = [OneShape(*s) for s in ((4, 256, 3, 2), (4, 128, 4, 1), (8, 128, 4, 1), (2, 256, 4, 1), (2, 512, 3, 2),
                               (4, 256, 4, 2), (4, 1024, 1, 4), (4, 512, 2, 4), (8, 256, 3, 4))]  # fmt: skip
_WEIGHT_ONLY = [FewShape(n, 128, *s) for n, *s in ((64, 1, 3, 4), (32, 1, 4, 2), (64, 4, 4, 4), (64, 8, 3, 2))]
_CODES = [FewShape(*s) for s in ((64, 128, 1, 4, 4), (128, 128, 1, 4, 4), (64, 256, 1, 3, 4), (64, 256, 2, 3, 4),
                                 (64, 128, 4, 4, 4), (128, 128, 1, 3, 8), (64, 128, 1, 4, 4, True),
                                 (64, 256, 1, 3, 4, True), (128, 128, 1, 4, 8, True))]  # fmt: skip


class Copies(NamedTuple):
    """Products of copies of a matrix: with codes, scales of rows or of blocks, and in 16 bits."""

    rows: list[Fp8Product]
    blocks: list[Fp8Product]
    plain: list[DenseProduct]


Launch = Callable[[int], object]


def copies(matrix: Matrix, most: int) -> Copies:
    """Make the products, of so many rows at most."""
    scratch = Scratch(1 << 15, torch.device("cuda"))
    x = torch.randn(most, matrix.columns, device="cuda").bfloat16()
    out = torch.empty(most, matrix.rows, device="cuda").bfloat16()
    gated = torch.empty(most, matrix.rows // 2, device="cuda").bfloat16() if matrix.act else None
    operands = Operands(x, out, None, matrix.act, gated)
    found = Copies([], [], [])
    for _ in range(max(2, int(_COLD / matrix.rows / matrix.columns) + 1)):
        plain = torch.randn(matrix.rows, matrix.columns, device="cuda").bfloat16()
        fp8 = made(plain)
        blocks = Fp8(torch.zeros(1, 128, dtype=torch.uint8, device="cuda"), torch.ones(1, 1, device="cuda"), (0, 0),
                     torch.bfloat16)  # fmt: skip
        blocks.rows, blocks.columns, blocks.codes, blocks.blocked = *plain.shape, fp8.codes, True
        blocks.scale = torch.rand(matrix.rows // 128, matrix.columns // 128, device="cuda")
        for many, packed in ((found.rows, fp8), (found.blocks, blocks)):
            many.append(packed.product(operands, scratch, False))
            many[-1].codes = many[0].codes
            many[-1].quantize(most, False)
        if len(found.plain) < 3 or plain.nbytes < 1 << 27:
            found.plain.append(DenseProduct(plain, operands, scratch))
    return found


def each(products: list[Fp8Product], launch: Callable[[Fp8Product], object]) -> Launch:
    """Return a launch that goes round the copies."""
    return lambda i: launch(products[i % len(products)])


def ways(matrix: Matrix, found: Copies, rows: int) -> Iterator[tuple[str, Launch]]:
    """Yield name and launch of the ways to compute a product of so many rows."""
    fp8, blocks, plain, early = *found, rows <= FEW
    yield "bf16", lambda i: plain[i % len(plain)].run(rows, early)
    yield "fp8", each(fp8, lambda p: p.run(rows, early))
    yield "blocks", each(blocks, lambda p: p.run(rows, early))
    yield from variants(matrix, fp8, rows, early)
    if rows >= 16:
        yield "quantize", each(fp8, lambda p: p.quantize(rows, early))
        yield "library, raw", each(fp8, lambda p: p.run_raw(rows))
    if rows >= 64:
        yield "library, rows", each(fp8, lambda p: p.run_scaled(rows))
        yield "library, blocks", each(blocks, lambda p: p.run_scaled(rows))


def variants(matrix: Matrix, fp8: list[Fp8Product], rows: int, early: bool) -> Iterator[tuple[str, Launch]]:
    """Yield the variants of sizes of our kernels."""
    if rows == 1:
        x, norm = fp8[0]._x, torch.ones(matrix.columns, dtype=torch.bfloat16, device="cuda")
        yield "one, normed", each(fp8, lambda p: p.one((x, norm, 1e-5), early=early))
    for one in _ONE if rows == 1 else ():
        yield f"one {tuple(one)}", each(fp8, lambda p, one=one: p.one(early=early, shape=one))
    for few in _WEIGHT_ONLY if rows <= 32 else ():
        if few.splits == 1 or not matrix.act:
            yield f"x16 {tuple(few)}", each(fp8, lambda p, few=few: p.run_weight_only(rows, early, few))
    for few in _CODES if 16 <= rows <= 256 else ():
        fits = matrix.columns % (few.columns * few.splits) == 0 and (few.splits == 1 or rows <= FEW)
        if fits and not (matrix.act and (few.splits > 1 or (few.outputs > 64 and rows > FEW))):
            yield f"codes {tuple(few)}", each(fp8, lambda p, few=few: p.run_codes(rows, early, few))


def check(matrix: Matrix, found: Copies, rows: int) -> str:
    """Return the relative errors of a product in FP8 against the product of the matrix in 16 bits."""
    errors = []
    for product in (found.rows[0], found.blocks[0]):
        product.run(rows)
        packed = product._matrix
        codes = packed.codes.view(torch.float8_e4m3fn).float().view(packed.rows, -1, 64, 2).transpose(2, 3)
        scale = packed.scale if packed.blocked else packed.scale[:, None]
        if packed.blocked:
            scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        y = product._x[:rows].float() @ (codes.reshape(packed.rows, -1) * scale).t()
        applies = product.applies_act(rows)
        if applies:
            gate, up = y.chunk(2, 1)
            y = torch.nn.functional.silu(gate) * up
        errors.append(off((product._out if applies else product._whole)[:rows], y))
    return " ".join(f"{error:.1e}" for error in errors)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=_ROWS)
    parser.add_argument("--only", default=",".join(MATRICES))
    parser.add_argument("--show", type=int, default=4, help="ways of each case")
    args = parser.parse_args(words)
    rows_list, names, start = [int(n) for n in args.rows.split(",")], args.only.split(","), time.perf_counter()
    kernels = Kernels("", 16, ("bench",))

    def everything() -> None:
        for name in names:
            found = copies(MATRICES[name], max(rows_list))
            for rows in rows_list:
                for _, launch in ways(MATRICES[name], found, rows):
                    try_once(launch)

    with torch.inference_mode():
        kernels.prepare(everything)
        print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
        for name in names:
            found = copies(MATRICES[name], max(rows_list))
            for rows in rows_list:
                print(measure(name, found, rows, args.show), flush=True)
            del found
            torch.cuda.empty_cache()
    kernels.close()
    print(f"{time.perf_counter() - start:.0f} s", flush=True)


def try_once(launch: Launch) -> str:
    """Launch, and return why that failed, or ""."""
    try:
        launch(0)
    except Exception as error:  # noqa: BLE001  Too much shared memory, a shape that the library lacks.
        return f"{type(error).__name__} {str(error)[:100]}"
    return ""


def measure(name: str, found: Copies, rows: int, show: int) -> str:
    """Return a line of the table: errors, floor, 16 bits, FP8 as it is chosen, and the fastest ways."""
    matrix, times = MATRICES[name], dict[str, float]()
    errors = check(matrix, found, rows)
    for way, launch in ways(matrix, found, rows):
        if why := try_once(launch):
            print(f"  {name} {rows} {way}: {why}", flush=True)
            continue
        torch.cuda.synchronize()
        times[way] = graph_us(launch, 2 * len(found.rows) if rows <= 256 else 4, 5)
    floor = max(matrix.rows * matrix.columns / _BYTES_S, 2 * rows * matrix.rows * matrix.columns / _FLOPS_S) * 1e6
    others = sorted((us, way) for way, us in times.items() if way not in ("bf16", "fp8", "blocks", "quantize"))
    best = "; ".join(f"{us:.1f} {way}" for us, way in others[:show])
    told = " ".join(f"{way} {times.get(way, 0):.1f}" for way in ("bf16", "fp8", "blocks", "quantize"))
    library = " ".join(f"{way[9:]} {us:.1f}" for way, us in times.items() if way.startswith("library"))
    return f"{name:8} {rows:5} off {errors} floor {floor:.1f} {told} | {library} | {best}"


if __name__ == "__main__":
    main()
