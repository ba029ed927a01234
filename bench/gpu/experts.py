"""Measure mixtures of experts on a GPU, one layer with random weights, in microseconds beside their floors.

    python3 -m bench.gpu.experts                             the layer of Qwen3-30B-A3B, with variants of sizes
    python3 -m bench.gpu.experts --shape gpt-oss --only layer

Results are compared with torch first. The floor is the larger of the bytes that must be read (chosen experts, rows) at
4 TB/s, and the products at 990 TFLOP/s. The best variants are copied by hand into `expert_shapes.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from bench.gpu import coded_stacks
from bench.gpu.floor import BYTES_S, FLOPS_S
from bench.gpu.timing import graph_us, off
from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.compile import Kernels
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.expert_banks import Stack
from tokenmill.backends.cuda.expert_shapes import RouteShape, RowShape, TileShape
from tokenmill.backends.cuda.experts import ExpertLowering
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.pack import DeviceWeights
from tokenmill.backends.cuda.products import dense
from tokenmill.backends.cuda.products.base import FEW, Operands
from tokenmill.backends.cuda.products.forms import Form
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.torch.experts import mixed, routed
from tokenmill.backends.torch.kinds import activation
from tokenmill.layers.moe import MoeMlp, Router, stacked
from tokenmill.layers.scope import Scope
from tokenmill.program import ops
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Inputs, Value, record

_LAYERS = 4  # with weights of their own, so that a second launch does not find them in the L2 cache


class Shape(NamedTuple):
    """Sizes of a layer. `more`: fields of its Experts."""

    width: int
    inner: int
    experts: int
    top_k: int
    act: str = "silu"
    biased: bool = False
    more: dict[str, Any] = {}  # noqa: RUF012


SHAPES = {
    "30b-a3b": Shape(2048, 768, 128, 8),
    "gpt-oss": Shape(2880, 2880, 32, 4, "quick_gelu", True, {"limit": 7.0, "up_offset": 1.0}),
    "mixtral": Shape(4096, 14336, 8, 2),
    "deepseek": Shape(7168, 512, 256, 8),
    "tiny": Shape(64, 32, 8, 2),
}


class Layer:
    """Layer `index` of a shape on the device. `form`: of its experts' matrices; None: 16 bits."""

    def __init__(self, shape: Shape, index: int, most: int, device: Device, form: Form | None = None) -> None:
        scope = Scope("m")

        def bias(name: str, count: int, rows: int) -> tuple[Weight, ...]:
            return tuple(Weight((Part(scope / name, rows, index=i),), 0) for i in range(count)) if shape.biased else ()

        def model(inputs: Inputs) -> Value:
            table = Weight((Part("t", 8),), shape.width)
            x = inputs.ids.record(ops.Embed, shape.width, ids=inputs.ids, table=table)
            router = Router(scope, shape.width, shape.experts, shape.top_k, renormalize=True)
            bank = stacked(scope, shape.experts, shape.width, shape.inner, ("gate_up", "down"))
            biases = bias("gate_up_bias", shape.experts, 2 * shape.inner), bias("down_bias", shape.experts, shape.width)
            bank = bank._replace(gate_up_bias=biases[0], down_bias=biases[1])
            return MoeMlp(router, bank, shape.act, **shape.more)(x)

        program = record(model)
        self.route, self.op = (o for o in program.ops if isinstance(o, ops.Route | ops.Experts))
        assert isinstance(self.route, ops.Route)
        assert isinstance(self.op, ops.Experts)
        draw = torch.Generator(device.torch).manual_seed(index)

        def drawn(*sizes: int, spread: float) -> torch.Tensor:
            out = torch.empty(sizes, dtype=torch.bfloat16, device=device.torch)
            return out.normal_(0, spread, generator=draw)

        self.stacks: dict[Weight, Stack] = {
            ws[0]: drawn(len(ws), ws[0].rows, *([ws[0].columns] if ws[0].columns else []), spread=0.03)
            for ws in self.op.weights().values()
        }
        if form is not None:
            for ws in (self.op.gate_up, self.op.down):
                self.stacks[ws[0]] = coded_stacks.drawn(form, len(ws), ws[0].rows, ws[0].columns, draw)
        self.router = drawn(shape.experts, shape.width, spread=shape.width**-0.5)
        self.memory = Memory(program, StepLimits(most, 256, most, 16), torch.bfloat16, device)
        weights = DeviceWeights({self.route.weight: self.router}, {}, self.stacks)
        self.lowering = ExpertLowering(self.memory, weights, False)
        self.routing, self.one_row = self.lowering.routing(self.route), self.lowering.one_row(self.op)
        self.products = self.lowering.products(self.op)
        self._runs = self.lowering.route(self.route), self.lowering.experts(self.op)
        self.x, self.ids, self.factors, self.out = (
            self.memory.value(v) for v in (self.route.x, self.op.ids, self.op.factors, self.op.out)
        )
        self.x.copy_(drawn(most, shape.width, spread=1.0))

    def run(self, rows: int) -> None:
        """Launch routing and products as the backend does."""
        self._runs[0](Sizes(rows, rows, self.ids, early=self.early(rows)))
        self.multiply(rows)

    def multiply(self, rows: int) -> None:
        """Launch the products alone."""
        self._runs[1](Sizes(rows, rows, self.ids, early=self.early(rows)))

    def early(self, rows: int) -> bool:
        """Return whether kernels are launched ahead."""
        return self.memory.device.launches_ahead and rows <= FEW

    def wanted(self, rows: int) -> torch.Tensor:
        """Return the result by torch, in float32."""
        assert isinstance(self.route, ops.Route)
        assert isinstance(self.op, ops.Experts)
        x = self.x[:rows].float()
        ids, factors = routed(self.route, x @ self.router.float().T, None)
        tensors = {
            w: tensor.float()
            for ws in self.op.weights().values()
            for w, tensor in zip(ws, coded_stacks.numbers(self.stacks[ws[0]], ws[0]), strict=True)
        }
        return mixed(self.op, x, ids, factors, tensors, activation(self.op.act))

    def chosen(self, rows: int) -> int:
        """Return the number of experts that any of the rows has chosen."""
        return len(self.ids[:rows].unique())


class Case(NamedTuple):
    """Case to time. `run(layer, variant)`: one launch or several. `bytes`, `flops`: of the floor."""

    name: str
    rows: int
    variants: list[Any]
    run: Callable[[Layer, Any], None]
    bytes: float = 0.0
    flops: float = 0.0

    @property
    def floor(self) -> float:
        """Microseconds."""
        return max(self.bytes / BYTES_S, self.flops / FLOPS_S) * 1e6


_ROUTE_ONE = [
    RouteShape(1, *sizes)
    for sizes in ((2, 1024, 2, 2), (1, 2048, 1, 1), (1, 1024, 2, 1), (2, 1024, 2, 1), (4, 512, 2, 1), (2, 2048, 1, 2))
]
_ROUTE_FEW = [RouteShape(16, *sizes) for sizes in ((16, 128, 4, 4), (16, 128, 4, 8), (16, 128, 5, 2))]
_ROUTE_MANY = [
    RouteShape(*sizes)
    for sizes in ((16, 128, 128, 3, 4), (64, 128, 128, 3, 8), (32, 128, 128, 3, 4), (32, 128, 128, 3, 8),
                  (16, 64, 128, 4, 4))
]  # fmt: skip
_UP_ONE = [RowShape(*sizes) for sizes in ((2, 2048, 1, 4), (1, 2048, 1, 4), (1, 2048, 1, 2), (2, 1024, 2, 4))]
_DOWN_ONE = [
    RowShape(*sizes)
    for sizes in ((2, 1024, 4, 4), (1, 1024, 4, 4), (1, 1024, 4, 2), (2, 1024, 4, 8), (4, 1024, 4, 8), (2, 256, 4, 1),
                  (2, 256, 4, 2), (4, 256, 4, 4), (2, 512, 4, 2))
]  # fmt: skip
_DENSE_ONE = [
    dense.RowShape(*sizes)
    for sizes in ((8, 512, 3, 2), (4, 1024, 4, 4), (4, 1024, 1, 4), (4, 512, 4, 4), (2, 2048, 1, 4), (4, 2048, 1, 4),
                  (2, 1024, 3, 4), (8, 512, 4, 4))
]  # fmt: skip
_FEW = ((64, 128, 4, 4), (64, 128, 3, 4), (128, 128, 3, 8), (32, 256, 3, 4))
"""Variants of tiles of few items: outputs, columns of a round, rounds in flight, warps."""
_SOME = (
    (128, 64, 4, 8), (64, 64, 4, 4), (128, 64, 2, 4), (128, 64, 2, 8), (64, 64, 3, 4), (128, 64, 3, 8, True),
    (128, 64, 2, 8, True),
)  # fmt: skip
"""Variants of more items: halves, too, and tiles of items side by side."""
_MANY = (
    (128, 64, 3, 8, True), (128, 64, 4, 8, True), (64, 64, 3, 4, True), (64, 64, 3, 8, True), (64, 64, 3, 4),
    (64, 32, 6, 4, True), (64, 32, 4, 4, True), (64, 128, 2, 4, True), (128, 32, 4, 8, True), (64, 64, 2, 4, True),
    (64, 64, 3, 4, True, 8), (64, 64, 3, 4, True, 32), (256, 64, 4, 8), (256, 64, 4, 8, True), (128, 64, 3, 4),
    (128, 64, 3, 4, True), (128, 64, 2, 4, True), (128, 64, 2, 8), (128, 64, 3, 8), (256, 64, 2, 8),
)  # fmt: skip


def tiles(items: int, sizes: tuple[tuple[int, ...], ...], gated: bool) -> list[TileShape]:
    """Return the variants whose sums fit the registers."""
    found = [TileShape(items, *size) for size in sizes]
    return [v for v in found if v.items * v.outputs * (2 if gated else 1) <= 128 * v.warps * 32]


def cases(layer: Layer, shape: Shape, rows_list: list[int], only: str) -> Iterator[Case]:
    """Yield the cases of a layer. Its routing has been run for the most rows."""
    width, inner, experts, top_k = shape[:4]
    for rows in rows_list:
        chosen, pairs = layer.chosen(rows), rows * top_k
        up_bytes, down_bytes = 4 * chosen * inner * width, 2 * chosen * inner * width
        up_flops, down_flops = 4 * pairs * inner * width, 2 * pairs * inner * width
        router = 2 * experts * width
        moved = 2 * rows * width
        both = up_bytes + down_bytes + router + 2 * moved, up_flops + down_flops + rows * router
        yield Case("layer", rows, [None], lambda at, _, n=rows: at.run(n), *both)
        if only == "layer":
            continue
        routes = _ROUTE_ONE if rows == 1 else _ROUTE_FEW if rows <= 256 else [*_ROUTE_MANY, *_ROUTE_FEW[:1]]
        yield Case("route", rows, routes, lambda at, v, n=rows: at.routing.run(n, v, at.early(n)), router + moved)
        if rows == 1:
            yield Case("up", rows, _UP_ONE, lambda at, v: at.one_row.gate_up(v, at.early(1)), up_bytes)
            yield Case("down", rows, _DOWN_ONE, lambda at, v: at.one_row.down(v, at.early(1)), down_bytes)
            yield from dense_cases()
            continue
        mean = pairs / experts
        sizes = (16, 32) if mean <= 8 else (32, 64) if mean <= 32 else (64, 128)
        yield Case("sort", rows, [sizes[0]], lambda at, v, n=rows: at.products.sort(n, v, at.early(n)))
        for size in sizes:
            some = _FEW if size <= 32 else _SOME if size == 64 else _MANY
            yield Case(f"up of {size}", rows, tiles(size, some, True),
                       lambda at, v, n=rows: at.products.gate_up(n, v, at.early(n)), up_bytes, up_flops)  # fmt: skip
            yield Case(f"down of {size}", rows, tiles(size, some, False),
                       lambda at, v, n=rows: at.products.down(n, v, at.early(n)), down_bytes, down_flops)  # fmt: skip
        sums = moved * (top_k + 1)
        yield Case("combine", rows, [None], lambda at, _, n=rows: at.products.combine(n, at.early(n)), sums)


def dense_cases() -> Iterator[Case]:
    """Yield the products of a single row with the matrices of attention: queries, keys and values; output."""
    for name, outputs, columns in (("qkv", 5120, 2048), ("o", 2048, 4096)):
        weights = [torch.randn(outputs, columns, device="cuda").bfloat16() for _ in range(8)]
        x, out = (torch.randn(1, n, device="cuda").bfloat16() for n in (columns, outputs))
        made = [dense.DenseProduct(weight, Operands(x, out), None) for weight in weights]

        def run(at: Layer, shape: dense.RowShape, made: list[dense.DenseProduct] = made) -> None:
            made.append(made.pop(0))  # Another matrix each time.
            made[0].one(early=at.early(1), shape=shape)

        yield Case(name, 1, _DENSE_ONE, run, 2 * outputs * columns)


def prepare(case: Case, layers: list[Layer], variant: Any) -> None:
    """Set what a case reads: ids, and the sorted pairs of tiles of the variant's size."""
    for layer in layers:
        layer.run(case.rows)
        if isinstance(variant, TileShape):
            layer.products.sort(case.rows, variant.items, False)


def measure(case: Case, layers: list[Layer]) -> list[tuple[float, Any]]:
    """Return microseconds and variants, the fastest first; variants that cannot run are left out."""
    found: list[tuple[float, Any]] = []
    several = 2 * len(layers) if case.floor > 300 else 8 * len(layers)
    for variant in case.variants:
        try:
            prepare(case, layers, variant)
            for layer in layers:
                case.run(layer, variant)
            torch.cuda.synchronize()
            us = graph_us(lambda i, variant=variant: case.run(layers[i % len(layers)], variant), several, 7)
        except Exception as error:  # noqa: BLE001  Too much shared memory, or the compiler's own faults.
            print(f"  {case.name} {case.rows} {variant}: {type(error).__name__} {str(error)[:80]}", flush=True)
            continue
        found.append((us, variant))
    return sorted(found, key=lambda pair: pair[0])


def check(layers: list[Layer], rows_list: list[int]) -> None:
    """Compare a layer's results with torch's."""
    for rows in rows_list:
        layer = layers[0]
        layer.out.fill_(float("nan"))
        layer.run(rows)
        first = layer.out[:rows].clone()
        error = off(first, layer.wanted(rows))
        layer.run(rows)
        assert torch.equal(first, layer.out[:rows]), "the same bits in every run"
        print(f"  {rows} rows: off by {error:.1e}", flush=True)
        assert error < 2e-2, (rows, error)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30b-a3b")
    parser.add_argument("--rows", default="1,64,256,512,1024,2048,8192")
    parser.add_argument("--only", choices=("layer", ""), default="")
    parser.add_argument("--show", type=int, default=3, help="variants of each case")
    args = parser.parse_args(words)
    start, shape, rows_list = time.perf_counter(), SHAPES[args.shape], [int(n) for n in args.rows.split(",")]
    device, most = Device("cuda"), max(rows_list)
    layers = [Layer(shape, i, most, device) for i in range(_LAYERS)]
    with torch.inference_mode():
        kernels = Kernels("", 16, ("bench",))
        layers[0].ids.copy_(torch.randint(0, shape.experts, layers[0].ids.shape, device="cuda"))

        def everything() -> None:
            for case in cases(layers[0], shape, rows_list, args.only):
                for variant in case.variants:
                    try:
                        case.run(layers[0], variant)
                    except Exception as error:  # noqa: BLE001  Reported when it is measured.
                        print(f"  {case.name} {variant}: {type(error).__name__}", flush=True)

        kernels.prepare(everything)
        print(f"{args.shape}: {shape}\n  compiled after {time.perf_counter() - start:.0f} s", flush=True)
        check(layers, [n for n in (1, 2, 64, 300, *rows_list[-1:]) if n <= most])
        for layer in layers:
            layer.run(most)
        lines = []
        for case in cases(layers[0], shape, rows_list, args.only):
            best = measure(case, layers)
            told = "; ".join(f"{us:.1f} {'' if v is None else tuple(v) if isinstance(v, tuple) else v}"
                             for us, v in best[: args.show])  # fmt: skip
            share = f"{best[0][0] / case.floor:5.2f} ×" if best and case.floor else "       "
            first = next((f"{us:.1f}" for us, v in best if case.variants and v == case.variants[0]), "-")
            lines.append(f"{case.rows:5} {case.name:12} floor {case.floor:7.1f} {share}  first {first:>7}  best {told}")
            print(lines[-1], flush=True)
        kernels.close()
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
