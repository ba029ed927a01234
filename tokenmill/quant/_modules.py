"""Exceptions by module of a quantization's description: modules that stay plain, and fields that differ by module.

A module's name is that of its tensors without the last part: `model.layers.0.mlp.down_proj`. Descriptions may use the
names of a multimodal model, in which the language part has a prefix, so a name is compared in all these forms.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from tokenmill.errors import ModelError

_PREFIXES = ("language_model.", "model.language_model.", "thinker.", "text_model.")
_REGEX = "re:"  # compressed-tensors' mark of a regular expression


@lru_cache(4096)
def names_of(module: str) -> tuple[str, ...]:
    """Return the names that a module has in checkpoints of a model alone, and as a part of a multimodal one."""
    bare = module.removeprefix("model.")
    return (module, *(prefix + name for prefix in _PREFIXES for name in dict.fromkeys((module, bare))))


def listed(module: str, entries: Iterable[str]) -> bool:
    """Return True if a list such as `modules_to_not_convert` names the module or one that holds it.

    An entry is a whole name (`lm_head`, `model.layers.0.self_attn`), adjacent parts of one (`mlp.gate`), or, behind
    "re:", a regular expression that the beginning of a name matches.
    """
    return any(_named(name, entry) for entry in entries for name in names_of(module))


def _named(name: str, entry: str) -> bool:
    if entry.startswith(_REGEX):
        return _compiled(entry.removeprefix(_REGEX)).match(name) is not None
    return f".{entry.strip('.')}." in f".{name}."


def override(module: str, rules: Mapping[str, Any]) -> Any:
    """Return the value of the first rule whose regular expression matches the beginning of the module's name.

    False for a rule whose key begins with "-:", which excludes the module, as in GPTQModel's `dynamic`; a key may begin
    with "+:". None if no rule matches.
    """
    for pattern, value in rules.items():
        excludes = pattern.startswith("-:")
        regex = _compiled(pattern.removeprefix("-:").removeprefix("+:"))
        if any(regex.match(name) for name in names_of(module)):
            return False if excludes else value
    return None


@lru_cache(256)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ModelError(
            f"The quantization's configuration names modules by {pattern!r}, which is no regular expression: {error}. "
            "Correct it in config.json."
        ) from None
