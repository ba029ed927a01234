"""Write a checkpoint of a model shape, with random bf16 weights and a matching tokenizer, for servers to load.

    python -m bench.gpu --checkpoint FOLDER --shape 8b

Norms are one. Every matrix is a slice of the same random numbers, from a different position. Complete files are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu.shapes import SHAPES
from bench.gpu.tell import tell
from bench.gpu.tensors import shapes_of
from bench.gpu.tokenizer import write_tokenizer
from tokenmill.models.base import program_of

_SHARD = 2 << 30  # maximum bytes of a file, unless a tensor is larger
_BLOCK = 1 << 24  # random numbers drawn
_ONE = 0x3F80  # bf16
_SPREAD = 0.02
Shapes = dict[str, tuple[int, ...]]


def write_checkpoint(folder: str | Path, config: dict[str, Any], *, shard_bytes: int = _SHARD) -> bool:
    """Write config.json, weights and tokenizer; return False if they exist already. Takes some seconds per 10 GB."""
    folder = Path(folder)
    shards = _shards(shapes_of(program_of(config)), shard_bytes)
    if _is_there(folder, config, shards):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # written last, to mark the folder complete
    block = _random(min(_BLOCK, max(math.prod(shape) for names in shards.values() for shape in names.values()) + 4096))
    with ThreadPoolExecutor(min(len(shards) + 1, os.cpu_count() or 1)) as threads:
        waiting = [threads.submit(_write_shard, folder / name, names, block) for name, names in shards.items()]
        waiting.append(threads.submit(write_tokenizer, folder, config))
        for one in waiting:
            one.result()
    sizes = {name: 2 * math.prod(shape) for names in shards.values() for name, shape in names.items()}
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {tensor: name for name, names in shards.items() for tensor in names},
    }
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    (folder / "config.json").write_text(json.dumps(config))
    return True


def _shards(shapes: Shapes, most: int) -> dict[str, Shapes]:
    """Distribute tensors over files: file -> its tensors."""
    groups: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        added = 2 * math.prod(shape)
        if groups[-1] and size + added > most:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += added
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _head(tensors: Shapes) -> bytes:
    """Encode the header of a safetensors file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        end = position + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _is_there(folder: Path, config: dict[str, Any], shards: dict[str, Shapes]) -> bool:
    given = folder / "config.json"
    if not given.is_file() or json.loads(given.read_text()) != config:
        return False
    sizes = {name: len(_head(group)) + sum(2 * math.prod(s) for s in group.values()) for name, group in shards.items()}
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def _random(count: int) -> NDArray[np.uint16]:
    """Draw `count` bf16 numbers around 0, as bit patterns."""
    drawn = np.random.default_rng(0).standard_normal(count, np.float32) * _SPREAD
    return (drawn.view(np.uint32) >> 16).astype(np.uint16)


def _pieces(name: str, shape: tuple[int, ...], block: NDArray[np.uint16]) -> Iterator[NDArray[np.uint16]]:
    """Yield a tensor's numbers in pieces."""
    left = math.prod(shape)
    if len(shape) == 1 and name.endswith("norm.weight"):
        yield np.full(left, _ONE, np.uint16)
        return
    start = zlib.crc32(name.encode()) % len(block)
    while left:
        piece = block[start : start + left]
        yield piece
        left, start = left - len(piece), 0


def _write_shard(path: Path, tensors: Shapes, block: NDArray[np.uint16]) -> None:
    with open(path, "wb", buffering=0) as out:
        for data in [_head(tensors), *(p for name, shape in tensors.items() for p in _pieces(name, shape, block))]:
            rest = memoryview(data).cast("B")  # type: ignore[arg-type]
            while rest:
                rest = rest[out.write(rest) :]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    args = parser.parse_args(words)
    start = time.perf_counter()
    written = write_checkpoint(args.checkpoint, SHAPES[args.shape])
    tell(bench="checkpoint", shape=args.shape, written=written, seconds=round(time.perf_counter() - start, 1))


if __name__ == "__main__":
    main()
