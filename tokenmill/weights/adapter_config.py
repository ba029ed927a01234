"""Read the configuration of a PEFT adapter: its base model, and whether it can be merged. Reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenmill.errors import ModelError, Unsupported
from tokenmill.weights.choice import ADAPTER_CONFIG
from tokenmill.weights.source import read_json

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_OTHER_FORMULAS = ("alora_invocation_tokens", "lora_bias", "use_qalora", "target_parameters", "trainable_token_indices",
                   "layer_replication", "arrow_config", "use_bdlora", "monteclora_config")  # fmt: skip


def base_of(folder: Path) -> tuple[str, str]:
    """Return the base model that an adapter's configuration names, and its revision ("": the newest).

    ModelError if it names none, Unsupported if the adapter is of a kind that cannot be merged.
    """
    about = read_json(folder / ADAPTER_CONFIG)
    base, revision = about.get("base_model_name_or_path"), about.get("revision") or ""
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG} names no base model. Set base_model_name_or_path to its Hub id or folder."
        )
    refuse_other_kinds(folder, about)
    return base, revision if isinstance(revision, str) else ""


def refuse_other_kinds(folder: Path, about: Mapping[str, Any]) -> None:
    """Raise Unsupported, with the key, if the configuration is of an adapter that cannot be merged while reading."""
    cure = f"{folder} is such an adapter. Merge it with peft (`merge_and_unload`, then `save_pretrained`) first."
    if about.get("peft_type") != "LORA":
        raise Unsupported("peft_type of an adapter", str(about.get("peft_type")), ("LORA",), cure)
    first = str(about.get("init_lora_weights")).lower()
    if first.startswith(_CHANGES_BASE):
        raise Unsupported("init_lora_weights", first, (), f"It changes the base model's weights. {cure}")
    for key in _OTHER_FORMULAS:
        if about.get(key):
            raise Unsupported("option of an adapter", key, (), cure)
