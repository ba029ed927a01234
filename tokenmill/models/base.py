"""Build a program from config.json, with the file of this package that is named after `model_type`.

A multimodal model's `text_config` describes its language part, which is what is built. `_aliases.py` names model types
that are built by the file of another one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import isfinite
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import msgspec

from tokenmill import plugins
from tokenmill.errors import ModelError, StartError, Unsupported
from tokenmill.layers.scope import Scope
from tokenmill.misfit import misfit
from tokenmill.models._aliases import ALIASES
from tokenmill.program.value import Inputs, Program, Value, record
from tokenmill.weights.checkpoint import language_path

_ROPE_PLACES = ("rope_scaling", "rope_parameters")
_BESIDE_ROPE = ("rope_theta", "partial_rotary_factor")
_LAYER_KINDS = {"full_attention", "sliding_attention"}
_LONG_ROPES = ("longrope", "su")
_ORIGINAL = "original_max_position_embeddings"
_DTYPES = ("float32", "bfloat16", "float16")
_INHERITED = ("tie_word_embeddings",)  # by the language part of a multimodal model

_log = logging.getLogger(__name__)

Length = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


class Config(msgspec.Struct, kw_only=True):
    """Facts of a model of any type. Base of the class `Config` in each file of this package."""

    mapped: ClassVar[frozenset[str]] = frozenset()
    """Fields with another name in config.json that may also have the name used here, which then wins"""

    max_position_embeddings: Length | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; None: not named

    @property
    def max_positions(self) -> int:
        """Maximum length of a sequence in tokens, with RoPE scaling applied."""
        assert self.max_position_embeddings is not None
        return self.max_position_embeddings

    @property
    def exact_prompt(self) -> int:
        """Longest prompt, in tokens, whose logits equal those of transformers."""
        return self.max_positions

    @property
    def unstretched(self) -> int:
        """Maximum length of a sequence in tokens, before RoPE scaling."""
        return self.max_positions


class Model(Protocol):
    """Interface of the class `Model` in a file of this package, which records names and sizes and reads no weights.

    The file also defines `Config`, derived from the one here, whose fields have the defaults of transformers' class. In
    config.json, a field that is bool or whose type admits None may be null.
    """

    def __init__(self, config: Any, scope: Scope) -> None:
        """Build the layers. `config`: an instance of the file's `Config`."""

    def __call__(self, inputs: Inputs) -> Value:
        """Record the model and return the logits of the rows that sample, (samples, vocabulary)."""


class Programs(NamedTuple):
    """Programs of a model, and its facts."""

    decoder: Program
    config: Config


def config_of(config: dict[str, Any]) -> Any:
    """Convert config.json to the `Config` of its model type. Raises Unsupported and ModelError as `make` does."""
    config = language_part(config)
    module = _module(config)
    try:
        given = _without_nulls(_fields(config, module.Config), module.Config)
        made = msgspec.convert(given, module.Config, strict=False)
        _refuse_infinite(made)
        return made
    except msgspec.ValidationError:
        why = misfit(given, module.Config, strict=False).sentence("its content")
        raise ModelError(f"config.json of the {config['model_type']} model cannot be used: {why}.") from None
    except (ValueError, ArithmeticError) as e:
        raise ModelError(f"config.json of the {config['model_type']} model cannot be used: {e}.") from e


def _refuse_infinite(config: Config) -> None:
    """Raise ValueError for a field that is no finite number, which JSON can state and no model can have."""
    for field in msgspec.structs.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"`{field.encode_name}` is {value}, which is no finite number")


def facts_of(config: dict[str, Any]) -> Config:
    """Return the facts of a model that may be of an unknown type. ModelError if they are invalid."""
    try:
        known: Config = config_of(config)
        _ = known.max_positions  # raises for an unknown kind of RoPE scaling
    except StartError:
        part = language_part(config)
    else:
        return known
    length = part.get("max_position_embeddings")
    try:
        return msgspec.convert({"max_position_embeddings": length, "dtype": dtype_of(part)}, Config)
    except msgspec.ValidationError:
        expected = "expected a number of at least 2"
        raise ModelError(f"config.json: max_position_embeddings is {length!r}; {expected}.") from None


def find(model_type: str) -> Any:
    """Import the file that builds a model type. Raises Unsupported with the model types that a file builds."""
    alias = ALIASES.get(model_type)
    if alias is not None:
        return plugins.find("models", alias.of)
    try:
        return plugins.find("models", model_type)
    except Unsupported:
        raise Unsupported("model type", model_type, names()) from None


def names() -> list[str]:
    """Return every model type that a file of this package builds, or a plug-in."""
    return sorted({*plugins.names("models"), *ALIASES})


def language_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a multimodal model's language part; `config` itself if the model is not multimodal.

    The dtype is that of the whole model. What the part does not state of `_INHERITED` is inherited.
    """
    path = language_path(config)
    if len(path) == 1:
        return config
    inherited = {name: part[name] for part in path for name in _INHERITED if name in part}
    return {**inherited, **path[-1], "dtype": next((dtype for part in path if (dtype := dtype_of(part))), None)}


def make(config: dict[str, Any]) -> Callable[[Inputs], Value]:
    """Build the model without weights, which is enough to record the program, plan memory and count parameters.

    Raises Unsupported for an unknown `model_type`, and ModelError for an incomplete or inconsistent config.json.
    """
    model: Callable[[Inputs], Value] = _module(language_part(config)).Model(config_of(config), Scope())
    return model


def program_of(config: dict[str, Any]) -> Program:
    """Record the full-size program of a model. Requires no weights. Raises as `make` does."""
    return record(make(config))


def programs_of(config: dict[str, Any]) -> Programs:
    """Record the full-size programs of a model, and return them with its facts. Raises as `make` does.

    Logs a warning if only a part of the model is recorded.
    """
    programs, part = Programs(program_of(config), config_of(config)), language_part(config)
    if part is not config:
        _log.warning(
            "The %s model is multimodal. Its language part, a %s model, is served; it reads text only.",
            config.get("model_type"), part["model_type"],
        )  # fmt: skip
    return programs


def normalized(config: dict[str, Any], layered: bool = False, unrotated: bool = False) -> dict[str, Any]:
    """Return config.json with `rope_theta`, `rope_scaling`, `partial_rotary_factor` and `dtype`, in any version's form.

    transformers 5 writes the first three into `rope_parameters`. ModelError if both forms are present and differ. A
    dtype in which no model is computed becomes None.

    `layered`: the model type has a second rotation, for layers with a window. transformers 5 writes one object for each
    kind of layer; the second becomes `rope_local_base_freq` and `rope_local_scaling`. `unrotated`: the model type may
    have no rotation, which is meant if `rope_theta` is null.
    """
    found = {name: value for name, value in config.items() if name not in _ROPE_PLACES}
    for place in _ROPE_PLACES:
        rope = config.get(place) or {}
        if layered and isinstance(rope, dict) and rope and rope.keys() <= _LAYER_KINDS:
            rope, local = (dict(rope.get(kind) or {}) for kind in ("full_attention", "sliding_attention"))
            _add(found, "rope_local_base_freq", local.pop("rope_theta", None))
            _add(found, "rope_local_scaling", local or None)
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ModelError(f"config.json: {place} is {rope!r}, not an object of one kind for all layers.")
        for name in _BESIDE_ROPE:
            _add(found, name, rope.get(name))
        if unrotated and "rope_theta" in rope:
            found.setdefault("rope_theta", None)
        rope = {"rope_type" if k == "type" and "rope_type" not in rope else k: v for k, v in rope.items()}
        if rope.get("rope_type") in _LONG_ROPES:  # the length before scaling may be outside
            lengths = (config.get(_ORIGINAL), rope.get(_ORIGINAL), config.get("max_position_embeddings"))
            rope[_ORIGINAL] = next((length for length in lengths if length is not None), None)
        _add(found, "rope_scaling", {k: v for k, v in rope.items() if k not in _BESIDE_ROPE} or None)
    return {"rope_scaling": None, **found, "dtype": dtype_of(config)}


def dtype_of(config: dict[str, Any]) -> str | None:
    """Return the dtype that config.json names in either spelling."""
    named = (str(config.get(key) or "").removeprefix("torch.") for key in ("dtype", "torch_dtype"))
    return next((name for name in named if name in _DTYPES), None)


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
    return find(model_type)


def _fields(config: dict[str, Any], kind: type[Config]) -> dict[str, Any]:
    """Return config.json in any version's form, with the names and defaults of the file that builds the model."""
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    forms = "rope_local_base_freq" in types, type(None) in get_args(types.get("rope_theta"))
    alias = ALIASES.get(config["model_type"])
    if alias is None:
        return normalized(config, *forms)
    named = {alias.renamed.get(name, name): value for name, value in config.items()}
    return {**alias.defaults, **normalized(named, *forms)}


def _without_nulls(config: dict[str, Any], kind: type[Config]) -> dict[str, Any]:
    """Return the fields of `kind`, with null replaced by False for a bool, and kept where the type admits None."""
    found = {}
    for field in msgspec.structs.fields(kind):
        name = field.name if field.name in kind.mapped and field.name in config else field.encode_name
        if name not in config:
            continue
        value = config[name]
        if value is None and field.type is bool:
            value = False
        elif value is None and type(None) not in get_args(field.type):
            cure = "give it a value" if field.required else f"leave it out for its default, {field.default}"
            raise ValueError(f"`{name}` is null, which is no value of it; {cure}")
        found[field.encode_name] = value
    return found
