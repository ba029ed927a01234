"""Measure mixtures of experts whose weights stay quantized, beside 16-bit ones and the floor, in microseconds.

    python3 -m bench.gpu.expert_formats --shape gpt-oss --formats mxfp4         a block as it is launched, by rows
    python3 -m bench.gpu.expert_formats --shape 30b-a3b --formats int4 --sizes  the products' kernels by sizes, too

A block is the products with the chosen experts, from sorting to the weighted sum, without the router; it is compared
with torch first. The floor is the larger of reading what is chosen at 4.41 TB/s and of the products at 780 TFLOP/s.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from bench.gpu.coded_stacks import FORMS
from bench.gpu.experts import SHAPES, Layer, Shape
from bench.gpu.timing import graph_us, off
from tokenmill.backends.cuda.compile import Kernels
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.expert_shapes import RowShape, TileShape
from tokenmill.backends.cuda.products.forms import Form
from tokenmill.backends.cuda.shapes import power

BYTES_S, FLOPS_S = 4.41e12, 780e12
_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)


class Case(NamedTuple):
    """Layers of a shape in one format. `form`: None for 16 bits."""

    name: str
    form: Form | None
    layers: list[Layer]

    def block(self, rows: int) -> float:
        """Return microseconds of the products of so many rows."""
        several = 2 * len(self.layers) if rows > 512 else 6 * len(self.layers)
        return graph_us(lambda i: self.layers[i % len(self.layers)].multiply(rows), several, 7)


def floor_us(layer: Layer, shape: Shape, form: Form | None, rows: int) -> float:
    """Return the microseconds that no block of so many rows is faster than. Routing has been run."""
    matrices = ((2 * shape.inner, shape.width), (shape.width, shape.inner))
    size = sum(form.nbytes(n, k) if form else 2 * n * k for n, k in matrices) * layer.chosen(rows)
    flops = sum(2 * n * k for n, k in matrices) * rows * shape.top_k
    return max(size / BYTES_S, flops / FLOPS_S) * 1e6


def row_variants(top_k: int) -> tuple[list[RowShape], list[RowShape]]:
    """Return sizes for a single row: of gate and up, and of down."""
    ups = [(16, 3, 2, 1), (16, 3, 4, 2), (16, 3, 8, 4), (8, 3, 2, 2), (8, 3, 4, 4), (8, 2, 8, 8), (16, 4, 4, 4),
           (32, 3, 8, 2), (32, 3, 4, 2), (16, 2, 8, 8)]  # fmt: skip
    own = power(top_k)
    downs = [(64 // own, 4, 4, 1), (128 // own, 4, 4, 1), (64 // own, 3, 8, 2), (32 // own, 3, 4, 2),
             (64 // own, 3, 4, 2), (32 // own, 3, 8, 4), (64 // own, 2, 8, 4), (16 // own, 3, 4, 4)]  # fmt: skip

    def shapes(found: list[tuple[int, ...]]) -> list[RowShape]:
        return [RowShape(n, 0, stages, warps, on, splits) for n, stages, warps, splits in found for on in (False, True)]

    return shapes(ups), shapes(downs)


def tile_variants(items: int, width: int) -> list[TileShape]:
    """Return sizes of tiles of coded weights. `width`: of a slice."""
    few = [(64, 3, 2), (64, 3, 4), (32, 3, 2), (32, 4, 2), (64, 5, 2), (32, 5, 4)]
    many = [(64, 3, 4), (128, 3, 8), (128, 3, 4), (128, 2, 8)]
    found = []
    for outputs, stages, warps in few if items <= 16 else few[:3] + many if items == 32 else many:
        for depth, on in {(width, False), (width, True), (32, True)} if items <= 32 else {(32, True), (width, True)}:
            shape = TileShape(items, outputs, depth, stages, warps, group=8 if items > 32 else 16, on_weights=on)
            found += [shape, shape._replace(halves=True)] if items > 16 and stages == 3 else [shape]
    return found


def variants(case: Case, rows: int, items: int) -> Iterator[tuple[str, Any, Callable[[Layer], None]]]:
    """Yield the products' launches by sizes: name, sizes, launch. Routing has been run."""
    assert case.form is not None
    early = case.layers[0].early(rows)
    if rows == 1:
        ups, downs = row_variants(case.layers[0].op.ids.width)
        for row in ups:
            yield "up", row, lambda at, v=row: at.one_row.gate_up(v, early)
        for row in downs:
            yield "down", row, lambda at, v=row: at.one_row.down(v, early)
        return
    for layer in case.layers:
        layer.products.sort(rows, items, False)
    yield "sort", (items,), lambda at: at.products.sort(rows, items, early)
    yield "combine", (), lambda at: at.products.combine(rows, early)
    for tile in tile_variants(items, case.form.depth):
        yield f"up of {items}", tile, lambda at, v=tile: at.products.gate_up(rows, v, early)
        yield f"down of {items}", tile, lambda at, v=tile: at.products.down(rows, v, early)


def sizes(case: Case, rows: int, items: int, show: int) -> None:
    """Measure each product by sizes, and print the fastest ones."""
    layers, found = case.layers, dict[str, list[tuple[float, Any]]]()
    for layer in layers:
        layer.run(rows)
    for name, variant, run in variants(case, rows, items):
        try:
            us = graph_us(lambda i, run=run: run(layers[i % len(layers)]), 4 * len(layers), 5)
        except Exception as error:  # noqa: BLE001  Too much shared memory, or the compiler's own faults.
            print(f"  {name} {tuple(variant)}: {type(error).__name__} {str(error)[:60]}", flush=True)
            continue
        found.setdefault(name, []).append((us, tuple(variant)))
    for name, pairs in found.items():
        told = "; ".join(f"{us:.1f} {v}" for us, v in sorted(pairs)[:show])
        print(f"  {case.name} {rows:5} {name:11} {told}", flush=True)


def table(cases: list[Case], shape: Shape, rows_list: list[int]) -> None:
    """Print the blocks by rows: microseconds, times the floor, and times the first case."""
    print(f"{'rows':>5}  " + "   ".join(f"{case.name:>9} floor   ×  of {cases[0].name}" for case in cases))
    for rows in rows_list:
        parts, first = [], 0.0
        for case in cases:
            for layer in case.layers:
                layer.run(rows)
            us, floor = case.block(rows), floor_us(case.layers[0], shape, case.form, rows)
            first = first or us
            parts.append(f"{us:9.1f} {floor:7.1f} {us / floor:5.2f} {us / first:5.2f}")
        print(f"{rows:5}  " + "   ".join(parts), flush=True)


def check(case: Case, rows_list: list[int]) -> None:
    """Compare a layer's results with torch's."""
    layer, found = case.layers[0], []
    for rows in rows_list:
        layer.out.fill_(float("nan"))
        layer.run(rows)
        first = layer.out[:rows].clone()
        found.append(off(first, layer.wanted(rows)))
        layer.run(rows)
        assert torch.equal(first, layer.out[:rows]), "the same bits in every run"
        assert found[-1] < 2e-2, (case.name, rows, found[-1])
    print(f"  {case.name}: off by " + ", ".join(f"{error:.1e}" for error in found), flush=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30b-a3b")
    parser.add_argument("--formats", default="bf16,int4", help=f"of bf16, {', '.join(FORMS)}")
    parser.add_argument("--rows", default=",".join(map(str, _ROWS)))
    parser.add_argument("--layers", type=int, default=4, help="with weights of their own, so that none is in the L2")
    parser.add_argument("--sizes", default="", help="rows:items, … to measure the kernels by sizes, such as 1:0,64:16")
    parser.add_argument("--show", type=int, default=4)
    args = parser.parse_args(words)
    start, shape, rows_list = time.perf_counter(), SHAPES[args.shape], [int(n) for n in args.rows.split(",")]
    tuned = [tuple(map(int, pair.split(":"))) for pair in args.sizes.split(",") if pair]
    device, most = Device("cuda"), max([*rows_list, *(rows for rows, _ in tuned)])
    with torch.inference_mode():
        kernels, cases = Kernels("", 16, ("bench",)), list[Case]()
        for name in args.formats.split(","):
            form = None if name == "bf16" else FORMS[name]
            cases.append(Case(name, form, [Layer(shape, i, most, device, form) for i in range(args.layers)]))
            cases[-1].layers[0].ids.copy_(torch.randint(0, shape.experts, cases[-1].layers[0].ids.shape, device="cuda"))
        print(f"{args.shape}: drawn after {time.perf_counter() - start:.0f} s", flush=True)

        def everything() -> None:
            for case in cases:
                for rows in {*rows_list, 2, 300}:
                    case.layers[0].run(min(rows, most))
                case.layers[0].wanted(1)
                for rows, items in tuned if case.form else ():
                    for _, _, run in variants(case, rows, items):
                        run(case.layers[0])

        kernels.prepare(everything)
        print(f"  compiled after {time.perf_counter() - start:.0f} s", flush=True)
        for case in cases:
            check(case, [n for n in (1, 2, 64, 300, most) if n <= min(most, 1024)])
            for layer in case.layers:
                layer.run(most)
            for rows, items in tuned if case.form else ():
                sizes(case, rows, items, args.show)
        table(cases, shape, rows_list)
        kernels.close()
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
