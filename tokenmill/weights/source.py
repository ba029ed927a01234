"""Where a model's files are, and in which format. Looks at names only; opens nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tokenmill.errors import ModelError


class ModelSource(msgspec.Struct, frozen=True):
    """A model on disk, ready to be opened. Plain data: it crosses process borders as a dictionary."""

    model_id: str  # as the user says it; shown by /info
    path: str  # folder (safetensors and config.json) or a .gguf file
    format: str  # "safetensors" or "gguf"
    revision: str = ""  # commit sha if from the Hub
    tokenizer_config_path: str = ""


def local_source(path: str | Path, model_id: str | None = None) -> ModelSource:
    """Tell what the folder or file at `path` holds. ModelError with the cure if there is nothing to serve."""
    found, name = Path(path), model_id or str(path)
    if found.is_file():
        return ModelSource(name, str(_gguf_file(found)), "gguf")
    if not found.is_dir():
        raise ModelError(f"{found} does not exist. Give a folder of .safetensors files, or a .gguf file.")
    ggufs = sorted(p for p in found.glob("*.gguf") if not p.name.startswith("mmproj"))
    if any(found.glob("*.safetensors")):
        if not (found / "config.json").is_file():
            raise ModelError(f"{found} has .safetensors files but no config.json. Copy the model's config.json there.")
        return ModelSource(name, str(found), "safetensors")
    if len(ggufs) == 1:
        return ModelSource(name, str(ggufs[0]), "gguf")
    if ggufs:
        listed = ", ".join(p.name for p in ggufs[:8])
        raise ModelError(f"{found} has {len(ggufs)} GGUF files; give the path of one of them: {listed}.")
    raise ModelError(f"{found} has no weights to serve. {_what_instead(found)}")


def _gguf_file(path: Path) -> Path:
    if path.suffix.lower() == ".gguf":
        return path
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise ModelError(f"{path} is one file of a model. Give its folder: {path.parent}.")
    raise ModelError(f"{path} is neither a .gguf file nor a folder with config.json and .safetensors files.")


def _what_instead(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return "Its weights are pickled (.bin, .pt, .pth), which may run code when read: convert them to .safetensors."
    return "Expected .safetensors files with config.json, or a .gguf file."
