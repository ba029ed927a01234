"""Build a program from config.json, with the file of this package that is named after `model_type`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, get_args

import msgspec

from tokenmill import plugins
from tokenmill.errors import ModelError
from tokenmill.layers.scope import Scope
from tokenmill.misfit import misfit
from tokenmill.program.value import Inputs, Program, Value, record

_ROPE_PLACES = ("rope_scaling", "rope_parameters")
_BESIDE_ROPE = ("rope_theta", "partial_rotary_factor")


class Model(Protocol):
    """Interface of the class `Model` in a file of this package, which records names and sizes and reads no weights.

    The file also defines `Config`, whose fields have the defaults of transformers' class. In config.json, a field that
    is bool or whose type admits None may be null.
    """

    def __init__(self, config: Any, scope: Scope) -> None:
        """Build the layers. `config`: an instance of the file's `Config`."""

    def __call__(self, inputs: Inputs) -> Value:
        """Record the model and return the logits of the rows that sample, (samples, vocabulary)."""


def config_of(config: dict[str, Any]) -> Any:
    """Convert config.json to the `Config` of its model type. Raises Unsupported and ModelError as `make` does."""
    module = _module(config)
    try:
        given = _without_nulls(normalized(config), module.Config)
        return msgspec.convert(given, module.Config, strict=False)
    except msgspec.ValidationError:
        why = misfit(given, module.Config, strict=False).sentence("its content")
        raise ModelError(f"config.json of the {config['model_type']} model cannot be used: {why}.") from None
    except ValueError as e:
        raise ModelError(f"config.json of the {config['model_type']} model cannot be used: {e}.") from e


def make(config: dict[str, Any]) -> Callable[[Inputs], Value]:
    """Build the model without weights, which is enough to record the program, plan memory and count parameters.

    Raises Unsupported for an unknown `model_type`, and ModelError for an incomplete or inconsistent config.json.
    """
    model: Callable[[Inputs], Value] = _module(config).Model(config_of(config), Scope())
    return model


def program_of(config: dict[str, Any]) -> Program:
    """Record the full-size program of a model. Requires no weights."""
    return record(make(config))


def normalized(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with its RoPE settings as `rope_theta`, `rope_scaling` and `partial_rotary_factor`.

    transformers 5 writes all three into `rope_parameters`. ModelError if both forms are present and differ.
    """
    found = {name: value for name, value in config.items() if name not in _ROPE_PLACES}
    for place in _ROPE_PLACES:
        rope = config.get(place) or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ModelError(f"config.json: {place} is {rope!r}, not an object of one kind for all layers.")
        for name in _BESIDE_ROPE:
            _add(found, name, rope.get(name))
        rope = {"rope_type" if k == "type" and "rope_type" not in rope else k: v for k, v in rope.items()}
        _add(found, "rope_scaling", {k: v for k, v in rope.items() if k not in _BESIDE_ROPE} or None)
    return {"rope_scaling": None, **found}


def _add(found: dict[str, Any], name: str, value: Any) -> None:
    """Set a field, or check that it equals the value already set."""
    before = found.get(name)
    if value is not None and before not in (None, value):
        raise ModelError(f"config.json has two values of {name}: {before!r} and {value!r}. Leave one of them out.")
    if value is not None:
        found[name] = value


def _module(config: dict[str, Any]) -> Any:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError("config.json names no model_type: it does not belong to a language model of transformers.")
    return plugins.find("models", model_type)


def _without_nulls(config: dict[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the fields of `kind`, with null replaced by False for a bool, and kept where the type admits None."""
    found = {}
    for field in msgspec.structs.fields(kind):
        if field.encode_name not in config:
            continue
        value = config[field.encode_name]
        if value is None and field.type is bool:
            value = False
        elif value is None and type(None) not in get_args(field.type):
            cure = "give it a value" if field.required else f"leave it out for its default, {field.default}"
            raise ValueError(f"`{field.encode_name}` is null, which is no value of it; {cure}")
        found[field.encode_name] = value
    return found
