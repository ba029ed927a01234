"""`tokenmill warmup`: do the work of a first start in advance, for container images and installers.

It takes the options of `serve`, downloads the model if necessary, and compiles its kernels into the kernel cache. The
kernels are for the processor that runs this command. For a GPU, the whole engine is started once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tokenmill import fetch, logs, progress
from tokenmill.config import Settings
from tokenmill.parallel.group import Group
from tokenmill.runtime.assembly import assemble
from tokenmill.runtime.choice import choose
from tokenmill.runtime.programs import programs_for
from tokenmill.runtime.worker import backend_options, engine_options
from tokenmill.weights.checkpoint import open_checkpoint


def main(words: Sequence[str]) -> int:
    """Run the command, print the results and return 0. Raises StartError if these options cannot be served."""
    settings = Settings.from_args(words, prog="tokenmill warmup")
    logs.set_up(settings.log_level, json=settings.json_output)
    screen = progress.display(json=settings.json_output)
    try:
        source = fetch.fetch(settings, screen.progress)
        options = backend_options(settings)
        checkpoint = open_checkpoint(source)
        program = programs_for(checkpoint, options).decoder
        choice = choose(program, options, settings.block_size, settings.num_shard or 1)
        done = choice.kind.compile(program, checkpoint, options, screen.progress, settings.num_shard or 1)
        if done is None:
            began = time.monotonic()
            assemble(source, engine_options(settings), Group(), screen.progress).close()
            screen.line(f"{source.model_id}: ready on the GPU in {time.monotonic() - began:.1f} s; kernels are kept.")
        elif done:
            screen.line(f"{source.model_id}: {done}")
        else:
            screen.line(f"{source.model_id} is served by the {choice.name} backend, which has nothing to compile.")
    finally:
        screen.close()
    return 0
