"""Convert pickled weights to safetensors: `python -m tokenmill.weights.convert FOLDER`.

Invariant: no other module unpickles. The conversion runs in its own process, reads with `weights_only=True` (tensors,
no code), and writes one .safetensors file next to each pickled file, and an index if there are several.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenmill.errors import ModelError, StartError
from tokenmill.weights.choice import ADAPTER_MODEL, ADAPTER_PICKLED
from tokenmill.weights.source import refuse_pointer, weights_in

_METADATA = {"format": "pt"}


def convert_folder(folder: Path) -> list[Path]:
    """Convert the pickled weights of `folder` and return the files written. Tensor names are unique over all files.

    A tensor that shares memory with one already written is left out, because readers treat it as tied. Each file is
    written atomically.
    """
    weights = weights_in(folder)
    if weights.files == (ADAPTER_PICKLED,):
        _write(_read(folder / ADAPTER_PICKLED), folder / ADAPTER_MODEL)
        return [folder / ADAPTER_MODEL]
    if weights.format != "pickled":
        raise FileNotFoundError(f"{folder} has no pickled weights, or others beside them")
    files = [folder / name for name in weights.files]
    several = len(files) > 1
    places: dict[str, str] = {}
    written = []
    for number, file in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors" if several else "model.safetensors"
        tensors = _read(file)
        _write(tensors, folder / name)
        places |= dict.fromkeys(tensors, name)
        written.append(folder / name)
    if several:
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return written


def _read(file: Path) -> dict[str, Any]:
    import torch

    refuse_pointer(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:
        raise ModelError(
            f"{file.name} is cut off, or holds something else than tensors ({type(error).__name__}). Download the file "
            "again, or look for a model with .safetensors files."
        ) from error
    if not isinstance(state, dict):
        raise ModelError(f"{file.name} holds a {type(state).__name__}, not named tensors.")
    state = state.get("state_dict", state)
    kept: dict[str, Any] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ModelError(f"{name} in {file.name} is a {type(tensor).__name__}, not a tensor.")
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor.contiguous()
    return kept


def _write(tensors: dict[str, Any], target: Path) -> None:
    from safetensors.torch import save_file

    partial = target.with_suffix(".partial")
    save_file(tensors, partial, metadata=_METADATA)
    partial.replace(target)


if __name__ == "__main__":
    try:
        convert_folder(Path(sys.argv[1]))
    except StartError as error:  # what ends any other way is traced, of which the parent tells the last line
        sys.exit(str(error).replace("\n", " "))
