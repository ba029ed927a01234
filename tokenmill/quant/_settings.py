"""A checkpoint's description of its quantization: where it stands, and its fields, checked.

It stands in config.json under `quantization_config`, of the whole model or of its language part, or in a file of older
programs, whose content `Safetensors` puts into the configuration under the name of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec

from tokenmill.errors import ModelError
from tokenmill.misfit import misfit, shown
from tokenmill.quant._memo import once
from tokenmill.weights.checkpoint import QUANTIZATION_FILES, Checkpoint, language_path

T = TypeVar("T")

_KEYS = ("quantization_config", "compression_config")
_NAMES = {
    "auto-round": "auto_round", "fbgemm-fp8": "fbgemm_fp8", "compressed_tensors": "compressed-tensors", "mxfp8": "fp8",
}  # fmt: skip


class Description(NamedTuple):
    """Description of a checkpoint's quantization."""

    place: str  # for messages
    method: str
    content: Mapping[str, Any]


def described(source: Checkpoint) -> Description | None:
    """Return the description of the quantization that a checkpoint is stored in; None if it has none.

    Raises ModelError if it is no object or names no method.
    """
    return once(source, "description", lambda: _described(source))


def _described(source: Checkpoint) -> Description | None:
    for part in reversed(language_path(source.config)):
        for key in _KEYS:
            if part.get(key):
                place = "config.json" if part is source.config else f"config.json of the {part['model_type']} part"
                return _description(f"{key} in {place}", part[key])
    for name, method in QUANTIZATION_FILES.items():
        if source.config.get(name):
            return _description(name, {"quant_method": method, **source.config[name]})
    return None


def _description(place: str, content: Any) -> Description:
    if isinstance(content, str):
        content = {"quant_method": content}
    if not isinstance(content, dict):
        raise ModelError(f"{place} is {shown(content)}, no object. Copy it from the model's repository again.")
    method = content.get("quant_method")
    if method is None and (content.get("load_in_8bit") or content.get("load_in_4bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or not method:
        why = "has no `quant_method`" if method is None else f"has `quant_method` {shown(method)}"
        raise ModelError(f"{place} {why}; it must be the name of the method, such as gptq. Set it.")
    return Description(place, _NAMES.get(method.lower(), method.lower()), content)


def settings(source: Checkpoint, kind: type[T]) -> T:
    """Return the fields of the description as a struct. ModelError names the field that does not fit its type.

    Requires a description. A field that is null has its default.
    """
    return once(source, (kind.__module__, kind.__qualname__), lambda: _settings(source, kind))


def _settings(source: Checkpoint, kind: type[T]) -> T:
    found = described(source)
    assert found is not None
    given = {name: value for name, value in found.content.items() if value is not None}
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError:
        why = misfit(given, kind, strict=False).sentence("its content")
        raise ModelError(f"{found.place} cannot be used: {why}.") from None


def misfits(source: Checkpoint, key: str, given: object, allowed: Iterable[object], cure: str) -> ModelError:
    """Return the error for a field of the description with a value that is not allowed. `cure`: a sentence."""
    found = described(source)
    place = found.place if found is not None else "The configuration"
    those = ", ".join(map(str, allowed))
    return ModelError(f"{place}: `{key}` is {shown(given)}; supported: {those}. {cure}")
