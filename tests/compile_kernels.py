"""Script run by test_cuda_compile.py in a process of its own, because Triton is interpreted in the others. Prints JSON.

It needs no GPU: Triton compiles for one, and launches are looked up in the cache instead.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import torch
import triton
from support_jobs import job_of
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.backends.cuda.compile import Kernels
from tokenmill.models.base import program_of
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source


class NoDevice:
    """Substitute for Triton's driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Lookup:
    """Substitute for a launch of Triton, which does all of it except the launch itself."""

    def __init__(self) -> None:
        self.hits: list[str] = []
        self.misses: list[str] = []
        triton.knobs.compilation.listener = self.listen
        triton.knobs.build.impl = self.build
        triton.JITFunction._do_compile = lambda *args: self.look(*args)  # type: ignore[method-assign]

    def listen(self, *, src: Any, cache_hit: bool, **_: object) -> None:
        (self.hits if cache_hit else self.misses).append(src.name)

    def build(self, name: str, *_: object) -> str:
        self.misses.append(name)
        raise RuntimeError("what launches a kernel should be in the cache")

    def look(
        self, fn: Any, key: str, signature: Any, device: int, constants: Any, options: Any, attrs: Any, warmup: bool
    ) -> None:
        if not fn._call_hook(
            triton.knobs.runtime.jit_cache_hook, key, signature, device, constants, options, [attrs], warmup
        ):
            kernel = fn.compile(
                fn.ASTSource(fn, signature, constants, attrs), target=fn.device_caches[device][2],
                options=options.__dict__,
            )  # fmt: skip
            CudaLauncher(kernel.src, kernel.metadata)


def backend_of(folder: str, cache: str, jobs: int) -> CudaBackend:
    source = open_checkpoint(local_source(folder))
    options: dict[str, Any] = {"cuda_graphs": (), "kernel_cache": cache, "cpus": jobs}
    limits = StepLimits(64, 4, 64, 16)
    backend = CudaBackend(job_of(program_of(source.config), source, limits, dtype="bfloat16", **options))
    backend.allocate(8)
    return backend


def helpers_of_dead_and_broken(cache: str) -> dict[str, Any]:
    broken = Kernels(cache, 2, ("c",))
    assert broken._helpers is not None
    broken._helpers.send("tokenmill.backends.cuda.kernels.rows", "nothing_of_this_name", "{}")
    found = {"broken": broken._helpers.wait(None)}
    broken.close()
    dead = Kernels(cache, 2, ("d",))
    assert dead._helpers is not None
    for process in dead._helpers._processes:
        process.kill()
        process.wait()
    dead._helpers.send("tokenmill.backends.cuda.kernels.rows", "embed_rows", "{}")
    found["dead"] = dead._helpers.wait(None)
    dead.close()
    return found


def main(folder: str, cache: str, jobs: int) -> None:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(NoDevice())
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    lookup, told, started = Lookup(), list[tuple[int, int]](), []

    driver = backend_of(folder, cache, jobs)
    started.append(driver._kernels._helpers is not None)

    def run() -> None:
        with torch.inference_mode():
            driver._decode(driver._padding_step(3, False))

    driver._kernels.prepare(run, lambda done, total: told.append((done, total)))
    run()
    found = {"hits": sorted(set(lookup.hits)), "misses": sorted(set(lookup.misses)), "told": told}
    found["cache"] = triton.knobs.cache.dir
    triton.knobs.build.impl = None
    driver._kernels.watch()
    run()
    for _ in range(2):
        driver._decode(driver._padding_step(1, False))  # of another class
    for about in (("a",), ("a",), ("b",)):
        kernels = Kernels(cache, jobs, about)
        started.append(kernels._helpers is not None)
        if about == ("a",):
            kernels.watch()
        kernels.close()
    again = backend_of(folder, cache, jobs)
    started.append(again._kernels._helpers is not None)
    again.close()
    print(json.dumps(found | helpers_of_dead_and_broken(cache) | {"started": started}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
