"""Speed of the CPU's products by form of the weights, relative to GGUF's Q4_0: `python -m bench.cpu_forms`.

The forms of one shape run in turn, each on panels that no cache holds, so that noise meets all alike. Medians.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import numpy as np

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.cache import KernelCache, cache_folder
from tokenmill.backends.cpu.isa import detect
from tokenmill.backends.cpu.pack import Packed, pack
from tokenmill.quant.base import Coded

_COPIES_BYTES = 192 << 20  # panels of a form that are rotated


def matrix(kind: str, rows: int, columns: int, rng: np.random.Generator) -> Coded:
    """Return a random matrix as a format stores it."""
    group = 32 if kind == "Q4_0" else 128
    scale = rng.uniform(0.001, 0.01, (rows, columns // group)).astype(np.float16)
    if kind == "GPTQ 8 bits":
        codes = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
        return Coded(codes, "i8", scale, (1, group), zero=np.zeros((1, 1), np.int16))
    nibbles = rng.integers(0, 256, (rows, columns // 32, 16), dtype=np.uint8)
    zero = np.full((1, 1), 8, np.int16) if kind != "AWQ" else rng.integers(0, 16, scale.shape).astype(np.int16)
    return Coded(nibbles, "u4", scale, (1, group), zero=zero)


def run(function: object, packed: Packed, x: np.ndarray, scales: np.ndarray, out: np.ndarray) -> float:
    """Return the seconds of one product on one thread."""
    row, context, counter = (
        np.zeros(layout.COLUMNS, np.int64),
        np.zeros(layout.CONTEXT, np.int64),
        np.zeros(8, np.int64),
    )
    zeros, scratch = np.zeros(1024, np.float32), np.zeros(len(x) * 256, np.float32)
    for at, word in {
        layout.X: x.ctypes.data, layout.X_STRIDE: x.strides[0], layout.X_SCALES: scales.ctypes.data,
        layout.OUT: out.ctypes.data, layout.OUT_STRIDE: out.strides[0], layout.WIDTH: packed.columns,
        layout.WEIGHT: packed.address, layout.PANEL_BYTES: packed.panel_bytes, layout.PANELS: packed.count,
    }.items():  # fmt: skip
        row[at] = word
    for at, word in {
        layout.TOKENS: len(x), layout.THREADS: 1, layout.TILE: scratch.ctypes.data, layout.TILE_SIZE: len(x) * 1024,
        layout.ZEROS: zeros.ctypes.data,
    }.items():  # fmt: skip
        context[at] = word
    began = time.perf_counter()
    function(0, row.ctypes.data, context.ctypes.data, counter.ctypes.data)  # type: ignore[operator]
    return time.perf_counter() - began


def main() -> None:
    """Print a line for each format and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], help="outputs and inputs")
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    outputs, inputs = options.shape
    rng, isa = np.random.default_rng(0), detect("")
    kinds = ("Q4_0", "GPTQ", "AWQ", "GPTQ 8 bits")
    forms = {kind: pack(matrix(kind, outputs, inputs, rng)) for kind in kinds}
    copies = {
        kind: [Packed(p.form, p.panels.copy(), p.rows, p.columns) for _ in range(-(-_COPIES_BYTES // p.panels.nbytes))]
        for kind, p in forms.items()
    }
    code = KernelCache(cache_folder(""), isa, jobs=1).load([f"linear_{p.form}" for p in forms.values()])
    for rows in options.rows:
        x = rng.integers(-127, 128, (rows, inputs)).astype(np.int8)
        scales = rng.uniform(0.01, 0.02, (rows, inputs // 32, 2)).astype(np.float32)
        out = np.zeros((rows, outputs), np.float32)
        taken: dict[str, list[float]] = {kind: [] for kind in kinds}
        for n in range(options.repeats):
            for kind in kinds:
                packed = copies[kind][n % len(copies[kind])]
                taken[kind].append(run(code.function(f"linear_{packed.form}"), packed, x, scales, out))
        base = median(taken["Q4_0"])
        for kind in kinds:
            ratio = median(t / q for t, q in zip(taken[kind], taken["Q4_0"], strict=True))
            print(f"{isa.name}, {rows} rows: {kind} ({forms[kind].form}) {ratio:.3f} × Q4_0's {base * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
