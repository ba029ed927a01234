"""Digests that tell apart two models, or two ways of computing them.

Short hexadecimal texts for receipts and `system_fingerprint`. Invariant: they are equal for equal things on every
machine, and change with anything that may change an answer.
"""

from __future__ import annotations

import platform
from hashlib import sha256
from importlib import metadata
from pathlib import Path

import msgspec

from tokenmill.weights.source import ModelSource, source_files
from tokenmill.wire.messages import EngineInfo

_WHOLE = 8 << 20  # bytes of a file that is read whole; of longer files parts are read
_PART = 64 << 10
_NUM_PARTS = 16
_READ = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt", ".tiktoken")
_PACKAGES = {"torch": ("torch", "transformers")}  # by backend: packages that compute besides this one
_CAPACITY = frozenset({"model_id", "revision", "num_blocks", "max_input_tokens", "max_total_tokens", "long_capacity"})
"""Fields of `EngineInfo` that identify the model or bound its requests, and do not change what is computed."""


def model_digest(source: ModelSource) -> str:
    """Return the digest of a model's weights, configuration and tokenizer.

    Files of up to 8 MiB are read whole. Of longer files the size, the beginning, the end and 14 parts between are read,
    so that it takes no noticeable time. Blocks.
    """
    path = Path(source.path)
    files = sorted(p for p in path.iterdir() if p.suffix in _READ) if path.is_dir() else source_files(source)
    if source.adapter:
        files += sorted(p for p in Path(source.adapter).iterdir() if p.suffix in _READ)
    if source.tokenizer_config_path:
        files.append(Path(source.tokenizer_config_path))
    total = sha256()
    for file in files:
        if file.is_file():
            name = "model.gguf" if file == path else file.name
            total.update(f"{name}\0{_file_digest(file)}\0".encode())
    return total.hexdigest()[:16]


def _file_digest(file: Path) -> str:
    size = file.stat().st_size
    hashed = sha256(str(size).encode())
    with file.open("rb") as opened:
        if size <= _WHOLE:
            while part := opened.read(_PART):
                hashed.update(part)
        else:
            for i in range(_NUM_PARTS):
                opened.seek(i * (size - _PART) // (_NUM_PARTS - 1))
                hashed.update(opened.read(_PART))
    return hashed.hexdigest()


def engine_digest(info: EngineInfo, version: str, settings: str = "") -> str:
    """Return the digest of everything besides the model that may change the numbers: version, backend and its packages,
    formats, sizes of steps, number of ranks, kind of machine, and `settings`."""
    parts = [version, platform.machine(), settings]
    for name, value in sorted(msgspec.structs.asdict(info).items()):
        if name not in _CAPACITY:
            parts.append(f"{name}={value}")
    for package in _PACKAGES.get(info.backend, ()):
        try:
            parts.append(f"{package}={metadata.version(package)}")
        except metadata.PackageNotFoundError:
            parts.append(f"{package}=")
    return sha256("\0".join(parts).encode()).hexdigest()[:16]


def fingerprint(version: str, label: str, model: str, engine: str) -> str:
    """Return `system_fingerprint`: TGI's form, a version and a label, with one digest of `model` and `engine`
    between."""
    return f"{version}+{sha256(f'{model} {engine}'.encode()).hexdigest()[:10]}-{label or 'native'}"
