"""Measure how fast weights are loaded, beside safetensors' own `load_file` in the same run.

    python -m bench.loading [--gigabytes 3] [--rounds 5] [--dtype bfloat16] [--folder /tmp]

Writes a synthetic Llama checkpoint of random bytes. In each round every reader reads it twice: cold (the system was
asked to drop the files' pages) and warm; the order changes from round to round. `load_file` reads with pread, because
its mapped tensors are not read until they are used. *copy* copies the bytes of the mapped files to new memory, which is
the least that a loader does. The torch backend makes each weight a tensor. The CPU backend packs them in panels: it
reads every byte once and writes it once, in another order, so that *copy* is its floor, too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

LAYERS_A_FILE = 8


def config(gigabytes: float, dtype: str) -> dict[str, object]:
    """Return config.json of a model of about so many bytes, of matrices in the sizes of a model of 1.5B parameters."""
    hidden, inner, vocab = 2048, 8192, 32_000
    size = 4 if dtype == "float32" else 2
    layer = (2 * hidden + 2 * 512) * hidden + 3 * hidden * inner
    layers = max(1, round((gigabytes * 1e9 / size - 2 * vocab * hidden) / layer))
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": vocab, "torch_dtype": dtype,
    }  # fmt: skip


def write(folder: Path, gigabytes: float, dtype: str) -> int:
    """Write the checkpoint. Return its bytes."""
    from tokenmill.models.base import program_of
    from tokenmill.program.cost import weights_of

    about = config(gigabytes, dtype)
    (folder / "config.json").write_text(json.dumps(about))
    kind, size = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}[dtype]
    files: dict[int, dict[str, tuple[int, ...]]] = {}
    for weight in weights_of(program_of(about)):
        for part in weight.parts:
            layer = int(part.name.split(".")[2]) if ".layers." in part.name else 0
            shape = (part.rows, weight.columns) if weight.columns else (part.rows,)
            files.setdefault(layer // LAYERS_A_FILE, {})[part.name] = shape
    block = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float16 if size == 2 else np.float32).tobytes()
    total = 0
    for number, shapes in files.items():
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + int(np.prod(shape)) * size
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / f"model-{number + 1:05}-of-{len(files):05}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for at in range(0, end, len(block)):
                file.write(block[: end - at])
            os.fsync(file.fileno())
        total += end
    return total


def drop(files: list[Path]) -> None:
    """Ask the system to drop the files' pages."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def readers(folder: Path, files: list[Path], dtype: str) -> dict[str, Callable[[], object]]:
    """Return the readers by name."""
    import torch
    from safetensors.torch import load_file

    from tokenmill.backends.cpu.isa import detect
    from tokenmill.backends.cpu.prepare import prepare
    from tokenmill.backends.cpu.threads import default_threads
    from tokenmill.backends.torch.pack import pack
    from tokenmill.host import usable_cpus
    from tokenmill.models.base import program_of
    from tokenmill.parallel.group import Group
    from tokenmill.quant.base import reader_of
    from tokenmill.weights.checkpoint import open_checkpoint
    from tokenmill.weights.source import local_source

    def ours(make: Callable[..., object]) -> object:
        source = open_checkpoint(local_source(folder))
        return make(program_of(source.config), source, reader_of(source))

    kind, device = getattr(torch, dtype), torch.device("cpu")
    isa, threads = detect(None), default_threads(usable_cpus())
    return {
        "load_file": lambda: [load_file(path, backend="pread") for path in files],
        "copy": lambda: [np.memmap(path, np.uint8, "r").copy() for path in files],
        "torch": lambda: ours(lambda program, source, read: pack(program, source, read, Group(), kind, device)),
        "cpu": lambda: ours(lambda program, source, read: prepare(program, source, read, isa, threads, None)),
    }


def seconds(read: Callable[[], object]) -> float:
    """Return how long a reader takes."""
    gc.collect()
    start = time.perf_counter()
    kept = read()
    took = time.perf_counter() - start
    del kept
    return took


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--folder", help="where the checkpoint is written for the time of the run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        size = write(folder, options.gigabytes, options.dtype)
        files = sorted(folder.glob("*.safetensors"))
        all_readers = readers(folder, files, options.dtype)
        took: dict[str, dict[str, list[float]]] = {name: {"cold": [], "warm": []} for name in all_readers}
        names = list(all_readers)
        for number in range(options.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                drop(files)
                for state in ("cold", "warm"):
                    took[name][state].append(seconds(all_readers[name]))
    print(f"{size / 1e9:.2f} GB in {len(files)} files, {options.dtype}, medians of {options.rounds} rounds\n")
    print("| reader | cold GB/s | of load_file | warm GB/s | of load_file |\n|---|---|---|---|---|")
    for name, states in took.items():
        cells = []
        for state, times in states.items():
            ratios = [a / b for a, b in zip(took["load_file"][state], times, strict=True)]
            cells += [f"{size / 1e9 / median(times):.2f}", f"{median(ratios):.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
