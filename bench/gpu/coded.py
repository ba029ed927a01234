"""Measure products with matrices that stay quantized, beside those in 16 bits, in one run.

    python -m bench.gpu.coded                                    all kinds, the four matrices of an 8B layer
    python -m bench.gpu.coded --kinds int4 --rows 1,8 --variants  other sizes of tiles, too

Each product is compared with torch's of the unpacked matrix first. Times are medians of launches in a CUDA graph over
copies of the weights that no cache holds; the floor is reading the matrix at 4 TB/s.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu.floor import BYTES_S
from bench.gpu.quantized import KINDS, coded
from bench.gpu.timing import graph_us, off
from tokenmill.backends.cuda.products.base import Needs, NormedRow, Operands, Scratch
from tokenmill.backends.cuda.products.coded import CodedMatrix, CodedProduct
from tokenmill.backends.cuda.products.coded_shapes import CodedShape, coded_shape, crossover
from tokenmill.backends.cuda.products.dense import Dense, largest
from tokenmill.backends.cuda.products.pack import packed

MATRICES = {"qkv": (6144, 4096, ""), "o": (4096, 4096, ""), "gate/up": (28672, 4096, "silu"), "down": (4096, 14336, "")}
_ROTATED = 4e8  # bytes of weights that launches go over
_RIGHT = 8e-3  # relative error of a product in bfloat16


def upload(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).cuda()


class Case:
    """Copies of a matrix in a kind ("bf16": 16 bits), with products of up to `most` rows."""

    def __init__(self, kind: str, name: str, most: int, copies: int = 0) -> None:
        (n, k, act), self.kind, self.name = MATRICES[name], kind, name
        self.x = torch.randn(most, k, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(most, n, device="cuda", dtype=torch.bfloat16)
        gated = torch.empty(most, n // 2, device="cuda", dtype=torch.bfloat16) if act else None
        self.out, self.act, self.whole = (out if gated is None else gated), act, out
        self.matrices = list(self._copies(n, k, copies))
        needs = self.matrices[0].needs(most)
        self.scratch = Scratch(largest(n), torch.device("cuda"), needs if needs.unpacked else Needs(), torch.bfloat16)
        operands = Operands(self.x, out, None, act, gated)
        self.products = [matrix.product(operands, self.scratch, False) for matrix in self.matrices]

    def _copies(self, n: int, k: int, copies: int) -> Iterator[Any]:
        if self.kind == "bf16":
            first: Any = Dense(torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02)
        else:
            first = packed([coded(KINDS[self.kind], n, k, self.name)], upload, torch.bfloat16)
        yield first
        for _ in range((copies or int(_ROTATED / first.nbytes) + 1) - 1):
            if isinstance(first, CodedMatrix):
                codes, meta = first.codes.roll(1, 0), first.meta.clone()
                yield CodedMatrix(first.form, first.shape, codes, meta, first.factor, first.lookup)
            else:
                yield Dense(first._matrix.roll(1, 0))

    def right(self, rows: int, run: Callable[[int], None] | None = None) -> float:
        """Return the relative error of the first matrix's product."""
        matrix = self.matrices[0]
        if isinstance(matrix, CodedMatrix):
            weight = torch.empty(matrix.shape, device="cuda", dtype=torch.bfloat16)
            matrix.unpack(weight)
        else:
            weight = matrix._matrix
        want = self.x[:rows].float() @ weight.float().t()
        if self.act:
            gate, up = want.chunk(2, 1)
            want = torch.nn.functional.silu(gate) * up
        self.out.fill_(float("nan"))
        (run or self._run(rows))(0)
        if self.act and not self.products[0].applies_act(rows):
            gate, up = self.whole[:rows].chunk(2, 1)
            self.out[:rows] = torch.nn.functional.silu(gate.float()) * up
        return off(self.out[:rows], want)

    def _run(self, rows: int) -> Callable[[int], None]:
        return lambda i: self.products[i % len(self.products)].run(rows)

    def us(self, rows: int, run: Callable[[int], None] | None = None) -> float:
        """Return the microseconds of a product."""
        repeats = max(2, len(self.products)) if rows > 512 else 2 * len(self.products)
        return graph_us(run or self._run(rows), min(repeats, 60))

    def variant(self, rows: int, shape: CodedShape) -> Callable[[int], None]:
        """Return the launches of products with these sizes."""

        def run(i: int) -> None:
            product: CodedProduct = self.products[i % len(self.products)]
            product._launch(rows, shape, False)

        return run

    def single(self) -> Callable[[int], None]:
        """Return the launches of one row as in a step: qkv and gate/up behind a norm, o and down with a sum behind."""
        first, columns = self.products[0], self.x.shape[1]
        adds, norm = self.name in ("o", "down"), torch.ones(columns, device="cuda", dtype=torch.bfloat16)
        residual = (torch.zeros_like(self.out), self.out) if adds else None
        if not isinstance(first, CodedProduct):
            before = None if adds else (self.x, norm, 1e-5)
            return lambda i: self.products[i % len(self.products)].one(before, residual)
        weight = torch.ones(self.out.shape[1], device="cuda", dtype=torch.bfloat16)
        makes = first.normed(torch.empty_like(self.out), weight, 1e-5) if adds else None
        given = None if adds else NormedRow(self.x, norm, 1e-5, torch.ones(64, device="cuda"))
        return lambda i: self.products[i % len(self.products)].one(None, residual, False, given, makes)


def variants(case: Case, rows: int) -> list[CodedShape]:
    """Return other sizes than the chosen ones, that scratch memory has room for."""
    n, k, act = MATRICES[case.name]
    outputs, form = n // (2 if act else 1), case.matrices[0].form
    chosen = coded_shape(rows, outputs, k, bool(act), form)
    found = [chosen._replace(stages=chosen.stages + d) for d in (-1, 1)]
    found += [chosen._replace(outputs=size) for size in (32, 64, 128) if size != chosen.outputs]
    found += [chosen._replace(warps=warps) for warps in (2, 4, 8) if warps != chosen.warps]
    found += [chosen._replace(operand=not chosen.operand)]
    if form.depth == 64:
        found += [chosen._replace(depth=96 - chosen.depth), chosen._replace(depth=96 - chosen.depth, stages=4)]
    if rows > 64:
        found += [chosen._replace(outputs=128, warps=8), chosen._replace(rows=64)] if rows > 128 else []
    if not act and rows <= 128:
        found += [chosen._replace(splits=s) for s in (1, 2, 4, 8) if s != chosen.splits]
    return [
        s for s in dict.fromkeys(found)
        if s.splits == 1 or case.scratch.holds(-(-outputs // s.outputs), s.splits, s.outputs * s.rows, bool(act))
    ]  # fmt: skip


def compile_one(job: tuple[str, str, list[int], bool]) -> None:
    """Compile the kernels of a case into Triton's cache, in a process of its own."""
    kind, name, sizes, others = job
    case = Case(kind, name, max(sizes), 1)
    for rows in sizes:
        case.products[0].run(rows)
        if others and kind != "bf16" and rows <= 256:
            for shape in variants(case, rows):
                _tried(lambda rows=rows, shape=shape: case.variant(rows, shape)(0))  # type: ignore[misc]
    if 1 in sizes:
        case.single()(0)
    torch.cuda.synchronize()


def _tried(run: Callable[[], Any]) -> Any:
    """Return the result, or None if sizes do not fit the device."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001
        print("failed:", type(error).__name__, str(error)[:80], flush=True)
        return None


def measure(kind: str, name: str, sizes: list[int], others: bool) -> dict[int, float]:
    """Print and return the microseconds by rows."""
    case, found = Case(kind, name, max(sizes)), dict[int, float]()
    floor = case.matrices[0].nbytes / BYTES_S * 1e6
    for rows in sizes:
        error, found[rows] = case.right(rows), case.us(rows)
        wrong = "" if error < _RIGHT else " WRONG"
        way = ""
        if kind != "bf16":
            way = " unpacked" if rows > crossover(case.matrices[0].form, MATRICES[name][0]) else ""
        told = f"{found[rows]:.2f} us, floor {floor:.1f}, error {error:.1e}{wrong}{way}"
        print(f"{kind} {name} {rows}: {told}", flush=True)
        if others and kind != "bf16" and rows <= 256:
            timed = [(_tried(lambda s=s: case.us(rows, case.variant(rows, s))), s) for s in variants(case, rows)]  # type: ignore[misc]  # noqa: B023
            best = sorted((us, tuple(s)) for us, s in timed if us is not None)[:3]
            print("    " + " | ".join(f"{us:.2f} {s}" for us, s in best), flush=True)
    if 1 in sizes:
        print(f"{kind} {name} 1 with norm or sum: {case.us(1, case.single()):.2f} us", flush=True)
    return found


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--matrices", default=",".join(MATRICES))
    parser.add_argument("--rows", default="1,8,16,32,64,128,256,2048,8192")
    parser.add_argument("--variants", action="store_true")
    args = parser.parse_args(words)
    kinds, names, sizes = ["bf16", *args.kinds.split(",")], args.matrices.split(","), args.rows.split(",")
    rows = [int(size) for size in sizes]
    jobs = [(kind, name, rows, args.variants) for kind in kinds for name in names]
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs))
    found: dict[str, dict[int, float]] = {}
    for kind in kinds:
        by_name = [measure(kind, name, rows, args.variants) for name in names]
        found[kind] = {n: sum(times[n] for times in by_name) for n in rows}
        torch.cuda.empty_cache()
    print("us of all matrices, and the share of bf16's")
    print(" " * 12 + "".join(f"{n:>16}" for n in rows))
    for kind, times in found.items():
        print(f"{kind:12}" + "".join(f"{times[n]:9.1f} ({times[n] / found['bf16'][n]:.2f})" for n in rows), flush=True)


if __name__ == "__main__":
    main()
