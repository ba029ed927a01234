"""Write a checkpoint as a folder of .safetensors files with an index, one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.weights.source import unreadable

_FILE_BYTES = 4 << 30
_ALIGNED = 8
_COPIED = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "additional_chat_templates",
)
_NOT_COPIED = ("config.json", "*.index.json", "quantize_config.json", "quant_config.json")


class Written(NamedTuple):
    """Tensor to write. `rows`: returns its bytes."""

    name: str
    kind: str  # as in `checkpoint.Stored`
    shape: tuple[int, ...]
    nbytes: int
    rows: Callable[[], NDArray[Any]]


def write(folder: Path, config: dict[str, Any], tensors: Sequence[Written], source: Path | None) -> list[Path]:
    """Write tensors and config.json to `folder`, and copy what else a model has from the folder `source`.

    Returns the files of tensors. Raises ModelError if the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = _write_tensors(folder, tensors)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if source is not None:
            _copy(source, folder)
    except OSError as error:
        raise unreadable(folder, error) from None
    return files


def _write_tensors(folder: Path, tensors: Sequence[Written]) -> list[Path]:
    runs: list[list[Written]] = [[]]
    for tensor in tensors:
        if runs[-1] and sum(t.nbytes for t in runs[-1]) + tensor.nbytes > _FILE_BYTES:
            runs.append([])
        runs[-1].append(tensor)
    names = [f"model-{n:05}-of-{len(runs):05}.safetensors" for n in range(1, len(runs) + 1)]
    names = ["model.safetensors"] if len(runs) == 1 else names
    for name, run in zip(names, runs, strict=True):
        _write_file(folder / name, run)
    if len(runs) > 1:
        places = {t.name: name for name, run in zip(names, runs, strict=True) for t in run}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]


def _write_file(path: Path, tensors: Sequence[Written]) -> None:
    """Write a file: the length of the header, the header, padded so that the data are aligned, and the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            rows = np.ascontiguousarray(tensor.rows())
            assert rows.nbytes == tensor.nbytes, tensor.name
            file.write(rows.tobytes())


def _copy(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, defaults of generation and licence."""
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            if any(path.match(no) for no in _NOT_COPIED):
                continue
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            elif path.resolve() != (folder / path.name).resolve():
                shutil.copyfile(path, folder / path.name)
