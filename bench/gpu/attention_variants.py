"""Measure variants of attention on a GPU: microseconds of a layer with random numbers, beside their floors.

    python3 -m bench.gpu.attention_variants                      all cases
    python3 -m bench.gpu.attention_variants --only latent,gemma

sinks: heads of GPT-OSS, plain and with sinks, ALiBi or both. latent: compressed rows of DeepSeek V2 Lite, with variants
of sizes. gemma: heads of Gemma 3 27B with and without its window. Results are compared with torch first. The floor is
the larger of the bytes that must be read at 4 TB/s, and the products at 990 TFLOP/s. The best variants are copied by
hand into `shapes.py`.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from bench.gpu.layers import REAL, Heads, Layers, Rows
from bench.gpu.timing import graph_us
from tokenmill.backends.cuda import attention, latent
from tokenmill.backends.cuda.compile import Kernels
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.shapes import CLASSES, DecodeShape, LatentShape, TileShape
from tokenmill.backends.cuda.sizes import Sizes


class Case(NamedTuple):
    """Case to time: variants of the sizes that `patched` names return; a name ("…") is a variant of a part alone."""

    name: str
    layers: Callable[[Device], Layers]
    patched: str
    variants: list[Any]
    floor: float


_LATENT_ONE = [
    LatentShape(16, *sizes)
    for sizes in ((32, 128, 32, 2, 4), (32, 128, 32, 3, 4), (32, 128, 32, 3, 8), (32, 64, 64, 3, 4),
                  (16, 128, 32, 4, 4), (16, 128, 32, 3, 2))
]  # fmt: skip
_TILES_OF_LATENT = ((64, 2, 4), (64, 2, 8), (64, 3, 8), (32, 2, 4), (32, 3, 4), (32, 4, 4), (32, 5, 4), (16, 4, 4))
_EXPANDED = [
    TileShape(*sizes)
    for sizes in ((128, 64, 3, 8), (64, 64, 2, 4), (128, 128, 2, 8), (128, 128, 1, 8), (64, 128, 2, 4))
]  # fmt: skip
_WINDOW = [
    DecodeShape(64, *sizes) for sizes in ((32, 128, 3, 4), (8, 256, 3, 4), (2, 512, 3, 4), (1, 64, 3, 4), (1, 64, 4, 4))
]
_SLOPES = tuple(2 ** (-8 * (i + 1) / 64) for i in range(64))


def _latent_variants(*splits: int) -> list[LatentShape]:
    """Return all tiles with the middle number of splits, and the first and fifth with the others."""
    middle = splits[len(splits) // 2]
    made = [(middle, tile) for tile in _TILES_OF_LATENT]
    made += [(n, _TILES_OF_LATENT[i]) for n in splits if n != middle for i in (0, 4)]
    return [LatentShape(16, keys, n, 128, stages, warps) for n, (keys, stages, warps) in made]


_FEW = not REAL
_CONTEXT, _LONG, _PROMPT = (40, 60, 40) if _FEW else (4096, 32768, 8192)
_BATCHES = (1, 3, 3) if _FEW else (1, 64, 256)


def _single(shape: Heads | Rows, rows: int, keys: int = _CONTEXT) -> Callable[[Device], Layers]:
    return lambda device: Layers(shape, rows, keys, 1, device)


def _run(shape: Heads | Rows, tokens: int) -> Callable[[Device], Layers]:
    return lambda device: Layers(shape, 1, _PROMPT, tokens, device)


def sink_cases() -> Iterator[Case]:
    """Yield attention of GPT-OSS, plain and with biases."""
    fields: dict[str, dict[str, Any]] = {
        "plain": {}, "sinks": {"sinks": True}, "alibi": {"alibi": _SLOPES}, "both": {"sinks": True, "alibi": _SLOPES},
    }  # fmt: skip
    for rows in _BATCHES[:2]:
        for name, own in fields.items():
            heads = Heads(64, 8, 64, own)
            yield Case(f"{name}, batch {rows}", _single(heads, rows), "", [None], heads.floor(rows, _CONTEXT))
    for name, own in fields.items():
        heads = Heads(64, 8, 64, own)
        yield Case(f"{name}, prompt", _run(heads, _PROMPT), "", [None], heads.floor_of_prompt(_PROMPT))


def latent_cases() -> Iterator[Case]:
    """Yield attention to compressed rows: single tokens, a prompt, and the end of one."""
    shape, parts = Rows(16), ["absorb", "expand"]
    some_of = _LATENT_ONE, _latent_variants(2, 4, 8), _latent_variants(1, 2, 4), _latent_variants(1, 2, 4)
    for rows, some in zip((*_BATCHES, _BATCHES[2] // 2), some_of, strict=True):
        name, floor = f"latent, batch {rows}", shape.floor(rows, _CONTEXT)
        yield Case(name, _single(shape, rows), "latent.latent_shape", [None, *some, *parts], floor)
    if not _FEW:
        wide = [LatentShape(g, keys, 4, 128, 2, warps) for g in (32, 64) for keys in (32, 64) for warps in (4, 8)]
        floor = Rows(128).floor(64, _CONTEXT)
        yield Case("latent, 128 heads, batch 64", _single(Rows(128), 64), "latent.latent_shape", [None, *wide], floor)
    floor = shape.floor_of_prompt(_PROMPT)
    yield Case("latent, prompt", _run(shape, _PROMPT), "latent.expanded_shape", [None, *_EXPANDED], floor)
    yield Case("latent, its end", _run(shape, _PROMPT // 20), "latent.expanded_shape", [None, _EXPANDED[3]], 0.0)


def gemma_cases() -> Iterator[Case]:
    """Yield attention of Gemma 3 27B at a long context."""
    for window in (20 if _FEW else 1024, 0):
        heads = Heads(32, 16, 128, {"window": window})
        for rows in (1, 3) if _FEW else (1, 16, 64) if window else (1, 16):
            name, floor = f"gemma, window {window}, batch {rows}", heads.floor(rows, _LONG)
            some = [None, *_WINDOW] if window else [None]
            yield Case(name, _single(heads, rows, _LONG), "attention.decode_shape", some, floor)


CASES = {"sinks": sink_cases, "latent": latent_cases, "gemma": gemma_cases}


def cases(only: list[str]) -> Iterator[Case]:
    """Yield the cases of some parts. Without a GPU they are small."""
    for name in only:
        yield from CASES[name]()


def launches(case: Case, layers: Layers, variant: Any) -> tuple[list[Callable[[Sizes], None]], Sizes]:
    """Return the launches of a variant: with sizes of its own, the backend's, or only a part of the kernels."""
    if isinstance(variant, tuple):
        module, name = case.patched.split(".")
        with patch.object(*_patched(module, name, variant)):
            runs, sizes, _ = layers.lowered()
        patched = _patched(module, name, variant)
        return [_within(run, *patched) for run in runs], sizes
    runs, sizes, lowering = layers.lowered()
    if variant is None:
        return runs, sizes
    tile = 16 if layers.rows <= CLASSES[-2] else 64
    if variant == "absorb":
        made = [lowering._absorb(op, attend=True) for op in layers.ops]
    else:
        made = [lowering._expand_values(op) for op in layers.ops]
    return [lambda n, each=each: each(n, 0, layers.rows, tile) for each in made], sizes


def _patched(module: str, name: str, variant: Any) -> tuple[Any, str, Any]:
    return {"latent": latent, "attention": attention}[module], name, lambda *_, **__: variant


def _within(run: Callable[[Sizes], None], module: Any, name: str, shape: Any) -> Callable[[Sizes], None]:
    """Return the launch with a function of sizes replaced, which it calls for each step."""

    def patched(n: Sizes) -> None:
        with patch.object(module, name, shape):
            run(n)

    return patched


def measure(case: Case, layers: Layers) -> list[tuple[float, Any]]:
    """Return microseconds and variants, the fastest first; variants that cannot run are left out."""
    found: list[tuple[float, Any]] = []
    for variant in case.variants:
        try:
            runs, sizes = launches(case, layers, variant)
            for run in runs:
                run(sizes)
            repeats = max(1, 16 // len(runs)) * len(runs)
            us = graph_us(lambda i, runs=runs, sizes=sizes: runs[i % len(runs)](sizes), repeats, 7)  # type: ignore[misc]
            found.append((us, variant))
        except Exception as error:  # noqa: BLE001  Too much shared memory, or the compiler's own faults.
            print(f"  {case.name} {variant}: {type(error).__name__} {str(error)[:80]}", flush=True)
    return sorted(found, key=lambda pair: pair[0])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="sinks,latent,gemma")
    parser.add_argument("--show", type=int, default=4, help="variants of each case")
    args = parser.parse_args(words)
    start, only, device = time.perf_counter(), args.only.split(","), Device("cuda" if REAL else "cpu")
    kernels = Kernels("", 16, ("bench", args.only))

    def everything() -> None:
        for case in cases(only):
            layers = case.layers(device)
            for variant in case.variants:
                try:
                    runs, sizes = launches(case, layers, variant)
                    runs[0](sizes)
                except Exception as error:  # noqa: BLE001  Reported when it is measured.
                    print(f"  {case.name} {variant}: {type(error).__name__}", flush=True)

    lines = []
    with torch.inference_mode():
        kernels.prepare(everything)
        print(f"  compiled after {time.perf_counter() - start:.0f} s", flush=True)
        for case in cases(only):
            gc.collect()
            if REAL:
                torch.cuda.empty_cache()
            layers = case.layers(device)
            off = layers.check()
            assert off < 2e-2, (case.name, off)
            best = measure(case, layers) if REAL else [(1.0, None)]
            own = next((us for us, v in best if v is None), 0.0)
            floor, share = case.floor * 1e6, f"{own / case.floor / 1e6:5.2f} ×" if case.floor else " " * 7
            some = [pair for pair in best if isinstance(pair[1], tuple)][: args.show]
            told = "; ".join(f"{us:.1f} {tuple(v)}" for us, v in some)
            told += "".join(f"; {v} alone {us:.1f}" for us, v in best if isinstance(v, str))
            lines.append(f"{case.name:30} off {off:.4f} floor {floor:7.1f} {share} us {own:8.1f}  {told}")
            print(lines[-1], flush=True)
            del layers
    kernels.close()
    print(f"after {time.perf_counter() - start:.0f} s:", *lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
