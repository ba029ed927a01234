"""Locate a model's files on this machine and determine their format. Reads names, indexes and first bytes only."""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tokenmill import jsontext
from tokenmill.errors import MissingFiles, ModelError
from tokenmill.weights.choice import ADAPTER_CONFIG, ADAPTER_PICKLED, Weights, choose, indexed_files, parts_of

_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER = 1024  # bytes; the format's own limit
_DEPTH = 3  # levels of folders below the model's that are searched for GGUF files
_SNIFFED = 200  # files without a known suffix whose first bytes are read
_log = logging.getLogger(__name__)


class ModelSource(msgspec.Struct, frozen=True):
    """Model on disk. Plain data, sent between processes as a dictionary."""

    model_id: str  # as the user gives it; shown by /info
    path: str  # folder (safetensors and config.json), or GGUF file or its first part
    format: str  # "safetensors" or "gguf"
    revision: str = ""  # commit sha if from the Hub
    tokenizer_config_path: str = ""
    adapter: str = ""  # folder of a PEFT adapter that is merged into the model of `path`; "": none

    @property
    def given(self) -> str:
        """Path that names the model as a whole: an adapter's folder, which names its base, or `path`."""
        return self.adapter or self.path


def on_this_machine(model_id: str) -> tuple[Path, str] | None:
    """Return the folder or file that `model_id` names, and the GGUF file named after a colon ("" if none).

    None if there is no such path. ModelError if access to it is denied.
    """
    head, colon, wanted = model_id.rpartition(":")
    if _exists(model_id):
        return Path(model_id), ""
    if colon and wanted and _exists(head) and Path(head).is_dir():
        return Path(head), wanted
    return None


def local_source(path: str | Path, model_id: str | None = None, wanted: str = "") -> ModelSource:
    """Determine the model in the folder or file at `path`. ModelError with the remedy if there is none.

    `wanted`: name of a GGUF file in the folder, or a part of it; "" for none.
    """
    found, name = Path(path), model_id or str(path)
    if _exists(found) and not found.is_dir():
        return ModelSource(name, str(_gguf_file(found)), "gguf")
    if not found.is_dir():
        raise ModelError(f"{found} does not exist. Give a folder of .safetensors files, or a .gguf file.")
    weights = weights_in(found, wanted)
    if weights.format == "adapter":
        raise ModelError(f"{found} is an adapter to another model.")  # which `hub.resolve` and `fetch` look for
    if weights.format == "gguf":
        return ModelSource(name, str(found / weights.files[0]), "gguf")
    if weights.format == "pickled":
        raise ModelError(
            f"{found} has no weights to serve. Its weights are pickled ({weights.files[0]}), which may run code when "
            "read: convert them to .safetensors."
        )
    if not (found / "config.json").is_file():
        message = f"{found} has .safetensors files but no config.json. Copy the model's config.json there."
        raise MissingFiles(message, ("config.json",))
    if (found / ADAPTER_CONFIG).is_file():
        _log.warning("%s has an adapter beside its weights (%s). The adapter is not applied.", found, ADAPTER_CONFIG)
    return ModelSource(name, str(found), "safetensors")


def weights_in(folder: Path, wanted: str = "") -> Weights:
    """Choose a folder's weights, with the files that its index names. ModelError with the remedy if there are none."""
    names, dangling = _listing(folder)
    explicit = _read(folder / "config.json").get("transformers_weights") if "config.json" in names else None
    unnamed = _unnamed_ggufs(folder, names)
    try:
        weights = choose([*names, *unnamed], str(folder), wanted, explicit if isinstance(explicit, str) else "")
    except ModelError as error:
        raise _explained(error, dangling) from None
    if not weights.index:
        return Weights(weights.format, tuple(unnamed.get(name, name) for name in weights.files))
    index = folder / weights.index
    files = sorted(set(indexed_files(read_json(index), str(index)).values()))
    for name in files:
        if name not in names:
            message = f"{folder / name} is missing, though {index.name} names it. Download the model again."
            raise MissingFiles(message, [name for name in files if name not in names])
    return Weights(weights.format, tuple(files), weights.index)


def is_pickled(path: Path, wanted: str = "") -> bool:
    """Return True if a folder's weights are pickled and must be converted. Raises ModelError as `weights_in` does."""
    weights = weights_in(path, wanted) if path.is_dir() else None
    return weights is not None and (weights.format == "pickled" or weights.files == (ADAPTER_PICKLED,))


def is_adapter(path: Path, wanted: str = "") -> bool:
    """Return True if a folder holds an adapter to another model only. Raises ModelError as `weights_in` does."""
    return path.is_dir() and weights_in(path, wanted).format == "adapter"


def source_files(source: ModelSource) -> list[Path]:
    """Return all files of a GGUF model, every part of a split one; an empty list for a folder."""
    path = Path(source.path)
    return [path.with_name(name) for name in parts_of(path.name)] if source.format == "gguf" else []


def adapter_error(where: str, config: Mapping[str, Any]) -> ModelError:
    """Explain that `where` holds an adapter (LoRA, …), not a model. `config`: its adapter_config.json, or {}."""
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    of = f" to the model {base}" if isinstance(base, str) and base else ""
    kind = f"{kind} adapter" if isinstance(kind, str) and kind else "an adapter"
    return ModelError(
        f"{where} is no model but {'a ' if kind[:2] != 'an' else ''}{kind}{of}: it has no weights of its own to serve. "
        "Merge it into its base model (peft: `merge_and_unload`, then `save_pretrained`) and give that folder."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model's folder; ModelError if it is missing or not an object."""
    refuse_pointer(path)
    try:
        content = json.loads(text := path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} is missing.") from None
    except OSError as e:
        raise unreadable(path, e) from None
    except (ValueError, RecursionError):
        why = jsontext.fault(text, sys.maxsize) or "it cannot be read"
        raise ModelError(f"{path} is not valid JSON: {why}. Download the file again.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object. Download the file again.")
    return content


def refuse_pointer(path: Path) -> None:
    """Raise ModelError with the remedy if the file is a Git LFS pointer. An unreadable file passes."""
    try:
        with path.open("rb") as file:
            start = file.read(_MAX_POINTER + 1)
    except OSError:
        return
    if start.startswith(_POINTER) and len(start) <= _MAX_POINTER:
        raise ModelError(
            f"{path} is a Git LFS pointer ({len(start)} bytes), not the file itself. Run `git lfs install` once and "
            f"`git lfs pull` in {path.parent}, or download the model again with `tokenmill download-weights`."
        )


def unreadable(path: str | Path, error: OSError) -> ModelError:
    """Return the error that explains why a file or folder cannot be read."""
    if isinstance(error, PermissionError):
        return ModelError(
            f"{path} cannot be read by the user with id {os.geteuid()}: {error.strerror}. Give that user the right to "
            "read it and to enter the folders above, or run as its owner."
        )
    return ModelError(f"{path} cannot be read: {error.strerror or error}.")


def is_gguf(path: Path) -> bool:
    """Return True if the file begins with GGUF's magic number, regardless of its name."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _exists(path: str | Path) -> bool:
    try:
        Path(path).stat()
    except PermissionError as e:
        raise unreadable(path, e) from None
    except (OSError, ValueError):  # the path is too long or has a NUL
        return False
    return True


def _listing(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the files below `folder`, without hidden folders, and of dangling links."""

    def fail(error: OSError) -> None:
        if error.filename == str(folder):
            raise unreadable(folder, error)

    names: list[str] = []
    dangling: list[str] = []
    for place, folders, files in os.walk(folder, onerror=fail):
        below = Path(place).relative_to(folder)
        folders[:] = [] if len(below.parts) >= _DEPTH else [each for each in folders if not each.startswith(".")]
        for file in files:
            there = (Path(place) / file).exists()
            (names if there else dangling).append((below / file).as_posix())
    return names, dangling


def _unnamed_ggufs(folder: Path, names: list[str]) -> dict[str, str]:
    """Return GGUF files without the suffix, by the name they should have, if no other file name marks weights."""
    if any(name.lower().endswith((".gguf", ".safetensors")) or name.startswith("pytorch_model") for name in names):
        return {}
    others = [name for name in names if "/" not in name and not name.endswith(".json")]
    return {f"{name}.gguf": name for name in others[:_SNIFFED] if is_gguf(folder / name)}


def _explained(error: ModelError, dangling: list[str]) -> ModelError:
    if not dangling or not isinstance(error, MissingFiles):
        return error
    message = (
        f"{error} {dangling[0]} is a link to a file that is not there: copy a model with the files behind its links "
        "(`cp -rL`), or mount the whole cache."
    )
    return MissingFiles(message, dangling)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _gguf_file(path: Path) -> Path:
    refuse_pointer(path)
    if path.suffix.lower() == ".gguf" or is_gguf(path):
        return _first_part(path)
    if path.suffix in (".safetensors", ".bin", ".json", ".model", ".jinja", ".pt", ".pth"):
        raise ModelError(f"{path} is one file of a model. Give its folder: {path.parent}.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ModelError(f"{path} is neither a file nor a folder.")
    raise ModelError(f"{path} is neither a GGUF file nor a folder with config.json and .safetensors files.")


def _first_part(path: Path) -> Path:
    parts = [path.with_name(name) for name in parts_of(path.name)]
    lacking = [part.name for part in parts if not part.exists()]
    if lacking:
        raise ModelError(
            f"{path} is one of {len(parts)} parts; missing in {path.parent}: {', '.join(lacking[:8])}. Download them."
        )
    return parts[0]
