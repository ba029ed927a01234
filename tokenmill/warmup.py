"""`tokenmill warmup`: what a first start on a machine would do before it is ready, done now.

It takes the options of `serve`, fetches the model if need be and compiles its kernels into the kernel cache. For images
and installers; the kernels are for the processor that runs this command, or for its GPU: there a whole start is made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tokenmill import fetch, logs, progress
from tokenmill.config import Settings, usable_cpus
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.quant.base import reader_of
from tokenmill.runtime.assembly import assemble
from tokenmill.runtime.choice import choose
from tokenmill.runtime.worker import computing
from tokenmill.runtime.worker import wants as wants_of
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.wire.messages import Progress


def main(words: Sequence[str]) -> int:
    """Print what was done; 0. Raises a StartError if these options cannot be served."""
    settings = Settings.from_args(words, prog="tokenmill warmup")
    logs.set_up(settings.log_level, json=settings.json_output)
    screen = progress.display(json=settings.json_output)
    try:
        source = fetch.fetch(settings, screen.progress)
        wants = computing(settings)
        checkpoint = open_checkpoint(source)
        program = program_of(checkpoint.config)
        choice = choose(program, wants, settings.block_size, settings.num_shard or 1)
        if choice.name == "cuda":
            began = time.monotonic()
            assemble(source, wants_of(settings), Group(), screen.progress).close()
            screen.line(f"{source.model_id}: ready on the GPU in {time.monotonic() - began:.1f} s; kernels are kept.")
            return 0
        if choice.name != "cpu":
            screen.line(f"{source.model_id} is served by the {choice.name} backend, which has nothing to compile.")
            return 0
        from tokenmill.backends.cpu.backend import KV_DTYPES
        from tokenmill.backends.cpu.cache import KernelCache
        from tokenmill.backends.cpu.explain import kernels_of
        from tokenmill.backends.cpu.isa import detect

        read = reader_of(checkpoint, wants.quantize)
        isa = detect(wants.cpu_isa)
        kinds = kernels_of(program, checkpoint, read, isa, KV_DTYPES[wants.kv_cache_dtype])
        names = ["walk", "serve", *(name for kernels in kinds.values() for name in kernels)]
        cache = KernelCache(Path(wants.kernel_cache), isa, jobs=usable_cpus())
        began = time.monotonic()
        compiled = cache.fill(names, lambda done, total: screen.progress(Progress("compile", done, total, "kernels")))
        took = f"{compiled} compiled in {time.monotonic() - began:.1f} s" if compiled else "all were there"
        screen.line(f"{source.model_id}: {len(set(names))} kernels for {cache.isa.name} in {cache.folder}; {took}.")
    finally:
        screen.close()
    return 0
