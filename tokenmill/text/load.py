"""Loads the tokenizer of a model from wherever the model keeps it."""

from __future__ import annotations

from pathlib import Path

from tokenmill.errors import ModelError
from tokenmill.text import folder, gguf_vocabulary
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights.source import ModelSource

_FILES = ("tokenizer.json", "tokenizer.model")


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """Read the tokenizer of a model on disk, which is the adapter's own if it has one.

    Raises ModelError, which names what is missing or unreadable.
    """
    path = Path(source.path)
    if source.adapter and any((Path(source.adapter) / name).is_file() for name in _FILES):
        return folder.load(Path(source.adapter), source.tokenizer_config_path)
    if path.is_dir():
        return folder.load(path, source.tokenizer_config_path)
    if source.format == "gguf":
        return gguf_vocabulary.load(path, source.tokenizer_config_path)
    raise ModelError(f"{path} has no tokenizer: expected a folder with tokenizer.json, or a GGUF file.")
