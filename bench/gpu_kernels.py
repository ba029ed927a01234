"""Tune the tile sizes of the GPU kernels: `python -m bench.gpu_kernels --parts prefill,products`.

Variants are compiled in several processes first. Each is then compared with torch in float32 and timed in a CUDA graph.
All results are written to a file; a table of the best variant of each case is printed last. The best variants are
copied by hand into `shapes.py` and `products/dense.py` of `backends/cuda`. For attention of single tokens see
`bench/gpu/decode_attention.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.gpu.timing import graph_us
from tokenmill.backends.cuda.kernels.prefill import attend_tiles
from tokenmill.backends.cuda.kernels.products import few_rows
from tokenmill.backends.cuda.kernels.rows import gate_rows
from tokenmill.backends.cuda.shapes import TileShape, power

HEADS, KV_HEADS, BLOCK = 32, 8, 16
MATRICES = {  # outputs, columns
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
           "head": (128256, 4096)},
    "1b": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192),
           "head": (128256, 2048)},
}  # fmt: skip


TILES = [
    TileShape(*sizes)
    for sizes in ((128, 64, 3, 8), (128, 64, 2, 8), (128, 128, 2, 8), (128, 32, 4, 4), (64, 64, 3, 4), (128, 64, 3, 4),
                  (256, 64, 2, 8), (64, 128, 2, 4), (128, 32, 3, 8))
]  # fmt: skip


_GATED = (
    (128, 128, 64, 1, 4, 8), (128, 128, 64, 1, 3, 8), (256, 64, 64, 1, 4, 8), (256, 64, 64, 1, 3, 8),
    (128, 128, 32, 1, 6, 8), (128, 64, 64, 1, 5, 4),
)  # fmt: skip
"""Variants for many rows: rows per tile, outputs, columns per iteration, splits, pipeline stages, warps."""


class Case(NamedTuple):
    """Case to time. `bytes`: bytes it must read. `run(variant)`: one launch. `off()`: relative error of the last."""

    name: str
    bytes: int
    flops: int
    variants: list[Any]
    run: Callable[[Any], None]
    off: Callable[[], float]


class Pages:
    """KV cache of one layer with shuffled blocks, and its block tables."""

    def __init__(self, lengths: np.ndarray, head_dim: int, dtype: torch.dtype) -> None:
        counts = -(-(lengths + 1) // BLOCK)
        order = np.random.default_rng(1).permutation(int(counts.sum()))
        table = np.zeros((len(lengths), int(counts.max())), np.int32)
        done = 0
        for row, count in enumerate(counts):
            table[row, :count] = order[done : done + count]
            done += count
        self.table = torch.from_numpy(table).cuda()
        shape = 2, int(counts.sum()) * BLOCK, KV_HEADS * head_dim
        self.cache = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.5).to(dtype)

    def dense(self, row: int, length: int) -> torch.Tensor:
        """Return keys and values of a sequence, (2, length, kv width), float32."""
        blocks = self.table[row, : -(-length // BLOCK)].long()
        places = (blocks[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")).reshape(-1)[:length]
        return self.cache[:, places].float()


def prefill_case(length: int, prefix: int, rows: int, head_dim: int, variants: list[Any]) -> Case:
    lengths = np.full(rows, prefix + length)
    pages = Pages(lengths, head_dim, torch.bfloat16)
    q = torch.randn(rows * length, HEADS * head_dim, device="cuda", dtype=torch.bfloat16)
    out, shared = torch.empty_like(q), HEADS // KV_HEADS

    def tiles(each: int) -> torch.Tensor:
        starts = [(r, i) for r in range(rows) for i in range(0, length, each)]
        made = [(r * length + i, prefix + i, min(each, length - i), r) for r, i in starts]
        return torch.tensor(made, dtype=torch.int32, device="cuda")

    held = {shape.rows: tiles(shape.rows // shared) for shape in variants}

    def run(shape: TileShape) -> None:
        some = held[shape.rows]
        attend_tiles[(len(some), KV_HEADS)](
            q, pages.cache[0], pages.cache[1], out, some, pages.table, q, q, q, q, q, pages.table.stride(0), 1,
            head_dim**-0.5 * 1.4427, 1.0, 1.0, KV_HEADS=KV_HEADS, D=head_dim, HALF=head_dim // 2, BLOCK_SIZE=BLOCK,
            G=shared, BM=shape.rows, BN=shape.keys, LEAST=512, WINDOW=0, CAPPED=False, SINKS=False, ALIBI=False,
            INVARIANT=False, SPLIT=False, CODES="", ASM=True, STAGES=shape.stages, num_warps=shape.warps,
        )  # fmt: skip

    def off() -> float:
        keys, values = (x.view(-1, KV_HEADS, head_dim).transpose(0, 1) for x in pages.dense(rows - 1, prefix + length))
        worst = 0.0
        for i in (0, length // 2, length - 1):
            heads = q[(rows - 1) * length + i].float().view(KV_HEADS, shared, head_dim)
            seen = prefix + i + 1
            made = (heads @ keys[:, :seen].transpose(1, 2) * head_dim**-0.5).softmax(-1) @ values[:, :seen]
            found = out[(rows - 1) * length + i].float()
            worst = max(worst, float((found - made.reshape(-1)).norm() / made.norm()))
        return worst

    flops = sum(4 * (prefix + i) * HEADS * head_dim for i in range(length)) * rows
    return Case(f"prefill {head_dim} {rows} x {length} behind {prefix}", 0, flops, variants, run, off)


def product_case(shape: str, matrix: str, rows: int, variants: list[Any]) -> Case:
    outputs, columns = MATRICES[shape][matrix]
    copies = max(2, int(4e8 // (outputs * columns * 2)))  # more than the L2 cache holds
    weights = [torch.randn(outputs, columns, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
    most = max(256, rows)
    x = torch.randn(most, columns, device="cuda", dtype=torch.bfloat16)
    gated = matrix == "gate_up"
    made = outputs // 2 if gated else outputs
    out = torch.empty(most, made, device="cuda", dtype=torch.bfloat16)
    whole = torch.empty(most, outputs, device="cuda", dtype=torch.bfloat16) if gated else out
    part = torch.empty(8 * 2 * power(made) * 128, device="cuda") if made < 1 << 16 else x
    counts = torch.zeros(1 << 14, dtype=torch.int32, device="cuda")
    turn = itertools.count()

    def run(variant: Any) -> None:
        weight = weights[next(turn) % copies]
        if variant == "cuBLAS":
            torch.mm(x[:rows], weight.t(), out=whole[:rows])
            if gated:
                gate, up = whole.chunk(2, 1)
                gate_rows[(rows, triton.cdiv(made, 1024))](gate, up, out, outputs, outputs, WIDTH=made, BLOCK=1024,
                                                            ACT="silu", num_warps=4)  # fmt: skip
            return
        bm, bn, bk, splits, stages, warps, tma = variant
        described = (
            (TensorDescriptor(x, [most, columns], [columns, 1], [bm, bk]), TensorDescriptor(weight, [outputs, columns],
             [columns, 1], [bn, bk])) if tma else (x, weight)
        )  # fmt: skip
        few_rows[(triton.cdiv(made, bn), splits, triton.cdiv(rows, bm))](
            *described, weight, out, part, counts, columns, rows, N=made, K=columns, BM=bm, BN=bn, BK=bk, SPLITS=splits,
            BIAS=False, ACT="silu" if gated else "", TMA=tma, PDL=False, STAGES=stages, num_warps=warps,
        )  # fmt: skip

    def off() -> float:
        weight = weights[(next(turn) - 1) % copies]
        y = x[:rows].float() @ weight.float().t()
        if gated:
            gate, up = y.chunk(2, 1)
            y = torch.nn.functional.silu(gate) * up
        return float((out[:rows].float() - y).norm() / y.norm())

    return Case(f"{shape} {matrix} x{rows}", outputs * columns * 2, 2 * rows * outputs * columns, variants, run, off)


def product_variants(rows: int, matrix: str, columns: int) -> list[Any]:
    if rows > 256:
        return ["cuBLAS", *((*sizes, True) for sizes in _GATED)] if matrix == "gate_up" else ["cuBLAS"]
    if rows > 128:
        return many_variants(matrix, columns)
    bm = max(16, power(rows)) if rows <= 64 else 128
    found: list[Any] = ["cuBLAS"]
    for bn, bk, stages, warps in ((64, 128, 4, 4), (64, 128, 6, 4), (128, 128, 3, 4), (128, 64, 4, 8), (64, 64, 6, 4)):
        tiles = (2 * bn if matrix == "gate_up" else bn) + bm
        if tiles * bk * 2 * stages > 225_000:
            continue
        for splits in (1,) if matrix in ("gate_up", "head", "qkv") else (1, 2, 4):
            if columns % (bk * splits) == 0:
                found += [(bm, bn, bk, splits, stages, warps, tma) for tma in (False, True)]
    return found


def many_variants(matrix: str, columns: int) -> list[Any]:
    """Return the variants for more than 128 rows."""
    found: list[Any] = ["cuBLAS"]
    sizes = (64, 64, 4, 4), (64, 64, 5, 4), (128, 64, 3, 8), (128, 64, 4, 8), (64, 128, 2, 4), (128, 32, 6, 8)
    for bm, (bn, bk, stages, warps) in itertools.product((128, 256), sizes):
        if ((2 * bn if matrix == "gate_up" else bn) + bm) * bk * 2 * stages <= 225_000:
            splits = {"gate_up": (1,), "head": (1,), "qkv": (1, 2)}.get(matrix, (1, 2, 4))
            found += [(bm, bn, bk, n, stages, warps, True) for n in splits if columns % (bk * n) == 0]
            if bm == 128 and bn == 128 and matrix != "gate_up":
                found += [(bm, 256, bk, n, stages, warps, True) for n in splits if columns % (bk * n) == 0]
    return found


def cases(parts: list[str], shapes: list[str], rows_of_products: list[int]) -> Iterator[Callable[[], Case]]:
    for shape in shapes:
        dim = {"8b": 128, "1b": 64}[shape]
        if "prefill" in parts:
            for length, prefix, rows in ((2048, 0, 4), (512, 0, 14), (512, 16384, 1)):
                yield lambda d=dim, n=length, p=prefix, r=rows: prefill_case(n, p, r, d, TILES)
        if "products" in parts:
            for (matrix, (_, columns)), rows in itertools.product(MATRICES[shape].items(), rows_of_products):
                yield lambda s=shape, m=matrix, r=rows, c=columns: product_case(s, m, r, product_variants(r, m, c))


def compile_some(parts: list[str], shapes: list[str], rows: list[int], which: int, of: int) -> None:
    """Run a share of the variants once, to fill the kernel cache on disk."""
    for case in itertools.islice(cases(parts, shapes, rows), which % 4, None, 4):
        made = case()
        for variant in made.variants[which // 4 :: of // 4]:
            try:
                made.run(variant)
                torch.cuda.synchronize()
            except Exception as e:  # noqa: BLE001  # a size that does not fit: the timing run tells
                print("no", made.name, variant, str(e).splitlines()[:1], flush=True)
        del made
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="prefill,products")
    parser.add_argument("--shapes", default="8b,1b")
    parser.add_argument("--rows", default="64,128,256", help="of products")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--out", default="kernels.jsonl")
    args = parser.parse_args()
    parts, shapes, rows = args.parts.split(","), args.shapes.split(","), [int(n) for n in args.rows.split(",")]
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=compile_some, args=(parts, shapes, rows, i, args.workers)) for i in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=max(1.0, args.seconds * 0.6 - (time.perf_counter() - began)))
        worker.kill()
    print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    table = []
    with open(args.out, "w", encoding="utf-8") as out:
        for make in cases(parts, shapes, rows):
            if time.perf_counter() - began > args.seconds:
                break
            case, found = make(), []
            for variant in case.variants:
                try:
                    us = graph_us(lambda _, case=case, variant=variant: case.run(variant))
                    found.append((us, str(variant), case.off()))
                except Exception as e:  # noqa: BLE001  # a size that does not fit
                    out.write(json.dumps({"case": case.name, "variant": str(variant), "failed": str(e)[:200]}) + "\n")
            for us, variant, off in sorted(found):
                out.write(json.dumps({"case": case.name, "variant": variant, "us": round(us, 2), "off": off}) + "\n")
            right = [f for f in sorted(found) if f[2] < 0.1]
            plain = next((f for f in found if f[1] == "cuBLAS"), None)
            for us, variant, off in [*right[:4], *([plain] if plain else [])]:
                rate = f"{case.bytes / us / 1e6:.2f} TB/s" if case.bytes else f"{case.flops / us / 1e6:.0f} TFLOP/s"
                table.append(f"{case.name:34} {us:8.1f} us {rate:12} off {off:.4f} {variant}")
                print(table[-1], flush=True)
            wrong = [f for f in found if not f[2] < 0.1]
            if wrong:
                print("WRONG", case.name, wrong[:3], flush=True)
            del case
            torch.cuda.empty_cache()
    print(f"done after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
