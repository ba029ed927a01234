"""Get the model of given settings onto the disk, in this process or in a child that the supervisor can stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from tokenmill.config import Settings
from tokenmill.errors import ArgumentError
from tokenmill.weights import embedded, hub
from tokenmill.weights.adapter_config import base_of
from tokenmill.weights.hub_names import parse
from tokenmill.weights.source import ModelSource, is_adapter, is_pickled, local_source, on_this_machine
from tokenmill.wire.control import ChildControl
from tokenmill.wire.messages import ModelReady, Progress


def on_disk(settings: Settings) -> ModelSource | None:
    """Return the model if it is local: a folder, a file, or the default model fetched before; else None.

    Reads file names only. Raises ModelError if the local files cannot be served, ArgumentError for wrong paths.
    """
    if settings.weights_cache_override:
        wanted = _chosen(settings.model_id)
        return _named(settings, local_source(settings.weights_cache_override, settings.model_id or None, wanted))
    if not settings.model_id:
        found = embedded.find(settings.cache_dir)
        return _named(settings, ModelSource(embedded.MODEL_ID, str(found), "gguf")) if found else None
    here = on_this_machine(settings.model_id)
    if here is None or is_pickled(*here):
        return None
    if is_adapter(*here):
        base = on_this_machine(base_of(here[0])[0])
        if base is None or is_pickled(*base) or is_adapter(*base):
            return None
        return _named(
            settings, hub.with_adapter(here[0], settings.model_id, lambda name, _: local_source(base[0], name, base[1]))
        )
    return _named(settings, local_source(here[0], settings.model_id, here[1]))


def fetch(settings: Settings, report: Callable[[Progress], None], *, convert: bool = True) -> ModelSource:
    """Return the model on disk, downloading it if necessary, and converting pickled weights if `convert`. Blocks.

    Raises DownloadError or ModelError with the remedy.
    """
    found = on_disk(settings)
    if found is not None:
        return found
    if not settings.model_id:
        return _named(settings, embedded.resolve(settings.cache_dir, settings.offline, report))
    source = hub.resolve(
        settings.model_id, revision=settings.revision, cache_dir=settings.huggingface_hub_cache,
        token=settings.hf_token, offline=settings.offline, report=report, convert=convert,
        code=settings.trust_remote_code,
    )  # fmt: skip
    return _named(settings, source)


def _chosen(model_id: str) -> str:
    """Return the GGUF file that a name on the Hub selects, or ""."""
    name = parse(model_id)
    return name.wanted if name else ""


def _named(settings: Settings, source: ModelSource) -> ModelSource:
    override = settings.tokenizer_config_path
    if override and not Path(override).is_file():
        raise ArgumentError(f"`tokenizer_config_path` {override!r} is not a file.")
    return msgspec.structs.replace(source, tokenizer_config_path=override)


def main(control: ChildControl) -> None:
    """Fetch the model in a child process: report progress, then send `ModelReady`."""
    source = fetch(Settings.from_dict(control.configure.settings), control.send)
    control.send(ModelReady(msgspec.to_builtins(source)))
