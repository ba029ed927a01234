"""Measure attention of single tokens on a GPU, with a cache of 16 bits beside one of 8: microseconds of a layer.

    python3 -m bench.gpu.decode_attention                        all cases, with the sizes that are served
    python3 -m bench.gpu.decode_attention --only 64x576 --variants

Heads of an 8B model, random numbers, pages in random order; rotation, the write of the new token and splits are counted
in. Results are compared with torch in float32 first. --variants: other sizes, too; the best are copied by hand into
`shapes.py`. The floor reads keys and values at 4.41 TB/s, what a copy reaches on an H200.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bench.gpu.attention_variants import Case, launches
from bench.gpu.layers import REAL, Heads, Layers
from bench.gpu.timing import graph_us
from tokenmill.backends.cuda.compile import Kernels
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.shapes import DecodeShape

BYTES_S = 4.41e12
HEADS = Heads(32, 8, 128) if REAL else Heads(4, 2, 16)
CACHES = {"16 bits": None, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Step(NamedTuple):
    """Single tokens: rows, and their context, or the least and the most of uneven ones."""

    rows: int
    least: int
    most: int

    @property
    def name(self) -> str:
        """Name of the step."""
        return f"{self.rows}x{self.most}" if self.least == self.most else f"{self.rows}x{self.least}..{self.most}"

    def contexts(self) -> NDArray[np.int32]:
        """Return the context of each row."""
        return np.random.default_rng(1).integers(self.least, self.most + 1, self.rows).astype(np.int32)


_SIZES = ((256, 576, 576), (64, 576, 576), (256, 2048, 2048), (64, 2048, 2048), (256, 100, 2047), (64, 100, 2047),
          (8, 8192, 8192), (8, 32768, 32768), (8, 576, 576), (1, 576, 576), (1, 8192, 8192), (32, 576, 576),
          (32, 8192, 8192), (128, 576, 576), (128, 100, 2047), (32, 100, 2047), (256, 100, 8000))  # fmt: skip
STEPS = {step.name: step for step in (Step(*s) for s in (_SIZES if REAL else ((3, 40, 40), (6, 5, 90))))}

_KEYS = ((16, 3, 1), (16, 4, 1), (32, 3, 1), (32, 3, 2), (32, 4, 2), (64, 3, 4), (64, 4, 4))  # and stages, warps
_SPLITS = {True: ((1, 64),), False: ((32, 128), (16, 128), (8, 128))}  # and the least keys of one; by many rows or few


def variants(step: Step) -> Iterator[DecodeShape]:
    """Yield other sizes for a step."""
    long = ((8, 512),) if step.most > 2048 and step.rows > 16 else ()
    for keys, stages, warps in _KEYS:
        for splits, least in (*_SPLITS[step.rows > 16], *long):
            yield DecodeShape(keys, splits, max(least, keys), stages, warps)


def cases(only: list[str], caches: list[str], more: bool) -> Iterator[Case]:
    """Yield the cases: steps with each kind of cache."""
    for name in only:
        step = STEPS[name]
        contexts = step.contexts()
        for cache in caches:
            dtype = CACHES[cache]
            nbytes = int(contexts.sum()) * HEADS.row_bytes // (1 if dtype is None else 2)
            some = [None, *variants(step)] if more else [None]
            yield Case(
                f"{name}, {cache}",
                lambda device, rows=step.rows, of=contexts, dtype=dtype: Layers(HEADS, rows, of, 1, device, dtype),  # type: ignore[misc]
                "attention.decode_shape", some, nbytes / BYTES_S,
            )  # fmt: skip


def microseconds(case: Case, layers: Layers, variant: DecodeShape | None) -> float:
    """Return the microseconds of a layer."""
    runs, sizes = launches(case, layers, variant)
    for run in runs:
        run(sizes)
    repeats = max(1, 16 // len(runs)) * len(runs)
    return graph_us(lambda i: runs[i % len(runs)](sizes), repeats, 7)


def measure(case: Case, device: Device) -> tuple[float, str]:
    """Return the microseconds of the sizes that are served, and a line about a case."""
    layers = case.layers(device)
    off = layers.check()
    assert off < (2e-2 if REAL else 5e-2), (case.name, off)
    found = []
    for variant in case.variants if REAL else ():
        try:
            found.append((microseconds(case, layers, variant), variant))
        except Exception as error:  # noqa: BLE001  Too much shared memory, or the compiler's own faults.
            print(f"  {case.name} {variant}: {type(error).__name__} {str(error)[:80]}", flush=True)
    own = next((us for us, variant in found if variant is None), 0.0)
    best = sorted((us, tuple(variant)) for us, variant in found if variant is not None)
    floor = case.floor * 1e6
    told = "; ".join(f"{us:.1f} {variant}" for us, variant in best[:4])
    return own, f"{case.name:22} off {off:.4f} floor {floor:6.1f} {own / floor:5.2f} × us {own:7.1f}  {told}"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STEPS))
    parser.add_argument("--caches", default="16 bits,e4m3", help=f"of {', '.join(CACHES)}")
    parser.add_argument("--variants", action="store_true")
    args = parser.parse_args(words)
    start, device = time.perf_counter(), Device("cuda" if REAL else "cpu")
    only, caches = args.only.split(","), args.caches.split(",")
    kernels = Kernels("", 16, ("bench", args.only, args.caches, args.variants))

    def everything() -> None:
        for case in cases(only, caches, args.variants):
            layers = case.layers(device)
            for variant in case.variants:
                runs, sizes = launches(case, layers, variant)
                runs[0](sizes)

    lines, of = [], dict[tuple[str, str], float]()
    with torch.inference_mode():
        kernels.prepare(everything)
        print(f"  compiled after {time.perf_counter() - start:.0f} s", flush=True)
        for case in cases(only, caches, args.variants):
            gc.collect()
            if REAL:
                torch.cuda.empty_cache()
            own, line = measure(case, device)
            name, cache = case.name.split(", ")
            of[name, cache] = own
            if first := of.get((name, caches[0])):
                line += f"  {own / first:.2f} of {caches[0]}"
            lines.append(line)
            print(line, flush=True)
    kernels.close()
    print(f"after {time.perf_counter() - start:.0f} s:", *lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
