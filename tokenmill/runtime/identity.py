"""Identity of a rank: what must be the same on all ranks of an engine."""

from __future__ import annotations

import importlib
from hashlib import blake2b
from pathlib import Path

from tokenmill.config import Settings
from tokenmill.weights.source import ModelSource

_OPTIONS = (
    "num_shard", "pipeline_parallel_size", "dtype", "quantize", "kv_cache_dtype", "backend", "device", "deterministic",
    "attention", "block_size", "max_batch_prefill_tokens", "max_batch_size", "max_input_tokens", "max_total_tokens",
    "memory_limit", "debug_plans", "mock",
)  # fmt: skip
"""Options that decide what an engine plans and computes."""
_WEIGHTS = (".safetensors", ".gguf", ".bin")


def facts_of(settings: Settings, source: ModelSource) -> dict[str, str]:
    """Return the facts that ranks compare, by the names that users know them by."""
    version: str = importlib.import_module("tokenmill").__version__  # the package imports this module for `LLM`
    options = {f"--{name.replace('_', '-')}": str(getattr(settings, name)) for name in _OPTIONS}
    return {"tokenmill": version, "the model's digest": digest_of(Path(source.path)), **options}


def digest_of(path: Path) -> str:
    """Return a digest of a model's config.json, and of the names and sizes of its weights. Reads no weight."""
    digest = blake2b(digest_size=6)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    for file in files:
        if file.name == "config.json":
            digest.update(file.read_bytes())
        elif file.suffix in _WEIGHTS:
            digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()
