"""From config.json to a recorded program: the model file is the one named after `model_type`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from tokenmill import plugins
from tokenmill.errors import ModelError
from tokenmill.layers.scope import Scope
from tokenmill.program.value import Inputs, Program, Value, record


class Model(Protocol):
    """What a file of models/ defines besides its `Config`: names and sizes; it reads no weight and knows no rank."""

    def __init__(self, config: Any, scope: Scope) -> None:
        """`config`: the file's `Config`."""

    def __call__(self, inputs: Inputs) -> Value:
        """Record the model; the logits of the rows that sample, (samples, vocabulary)."""


def make(config: dict[str, Any]) -> Callable[[Inputs], Value]:
    """The model, weightless: cheap, and enough to record, plan and count.

    Unsupported for an unknown `model_type`, ModelError for a config.json that lacks something or makes no sense.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError("config.json names no model_type: it does not belong to a language model of transformers.")
    module = plugins.find("models", model_type)
    try:
        read = msgspec.convert(normalized(config), module.Config, strict=False)
    except msgspec.ValidationError as e:
        raise ModelError(f"config.json of the {model_type} model cannot be used: {e}.") from e
    model: Callable[[Inputs], Value] = module.Model(read, Scope())
    return model


def program_of(config: dict[str, Any]) -> Program:
    """The program at full size; needs no weights."""
    return record(make(config))


def normalized(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with rope settings where every version of transformers would look for them, and without nulls."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"config.json: rope_scaling is {rope!r}, not an object.")
    theta = config.get("rope_theta") or rope.get("rope_theta", 10000.0)
    kept = {k: v for k, v in rope.items() if k != "rope_theta"}
    found = {**config, "rope_scaling": kept or None, "rope_theta": theta}
    return {k: v for k, v in found.items() if v is not None}
