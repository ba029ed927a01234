"""The programs of a model: of this package, or recorded from transformers for a model type that it does not have."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from tokenmill.backends.kind import BackendOptions
from tokenmill.errors import Unsupported
from tokenmill.extras import TRANSFORMERS_MAY, has_transformers
from tokenmill.models import base
from tokenmill.models.base import Config, Programs, dtype_of, language_part, programs_of
from tokenmill.weights.checkpoint import Checkpoint

_UNTRUSTED = (
    "Python code in its repository defines it (auto_map in config.json), which is not run unless you allow it. Read "
    "that code; if you trust it, give --trust-remote-code."
)
_UNKNOWN = "The installed transformers does not define it as a causal language model either."
_log = logging.getLogger(__name__)


def programs_for(checkpoint: Checkpoint, options: BackendOptions) -> Programs:
    """Record a model's programs. Raise Unsupported if nothing defines its type, or ModelError as `programs_of`."""
    config = checkpoint.config
    part = language_part(config)
    name = part.get("model_type")
    if not isinstance(name, str) or (options.backend != "transformers" and _is_here(name)):
        return programs_of(config)
    if not has_transformers():
        raise Unsupported("model type", name, base.names(), TRANSFORMERS_MAY)
    return _recorded(part, str(getattr(checkpoint, "folder", "")), options.trust_remote_code)


def _is_here(name: str) -> bool:
    """Return True if this package, or a plug-in, has a file for a model type."""
    try:
        base.find(name)
    except Unsupported:
        return False
    return True


def _recorded(config: dict[str, Any], folder: str, trusts_code: bool) -> Programs:
    """Record a model that transformers defines, or code in its folder if that is trusted. Log who computes it."""
    from tokenmill.backends.transformers.defined import has_code, is_known

    name, code = config["model_type"], ""
    if not is_known(name):
        if not has_code(config, folder):
            raise Unsupported("model type", name, base.names(), _UNKNOWN)
        if not trusts_code:
            raise Unsupported("model type", name, (), _UNTRUSTED)
        code = folder
        _log.warning("Python code in %s defines the %s model and is run, as --trust-remote-code allows.", code, name)
    elif trusts_code and "auto_map" in config:
        _log.info("--trust-remote-code has no effect: transformers itself defines the %s model.", name)
    from tokenmill.backends.transformers.record import record

    program, length = record(config, code)
    _log.warning(
        "transformers computes this %s model, with tokenmill's cache and attention. That is slower than a model type "
        "of docs/models.md, and takes one device.", name,
    )  # fmt: skip
    facts = {"max_position_embeddings": length, "dtype": dtype_of(config)}
    return Programs(program, msgspec.convert(facts, Config))
