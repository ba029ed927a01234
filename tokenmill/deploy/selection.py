"""Selection of the model that a request is for: by the first part of its path, or by the `model` field of its body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from tokenmill.server.failures import NotFound

_ANY = (None, "", "tgi")  # names that clients of TGI send whatever is served
_KSERVE = "/v2/models/"


class Served(NamedTuple):
    """A model: its name, and the id under which its own server knows it. `may_sleep`: it may have no replicas."""

    name: str
    model_id: str
    may_sleep: bool = False


class _Named(msgspec.Struct):
    """The field of a body that names a model."""

    model: str | None = None


_decode = msgspec.json.Decoder(_Named).decode


def select(models: Sequence[Served], path: str, body: bytes) -> tuple[Served, str]:
    """Return the model that a request is for, and the path for its server. Raises NotFound.

    With one model, every request is for it, and its server checks names. The first of several is for requests that name
    none.
    """
    first, _, rest = path[1:].partition("/")
    for model in models:
        if first == model.name:
            return model, "/" + rest
    if len(models) == 1:
        return models[0], path
    if path.startswith(_KSERVE):
        return _find(models, path[len(_KSERVE) :].partition("/")[0]), path
    name = _name_in(body)
    if name in _ANY:
        return models[0], path
    return _find(models, str(name)), path


def _find(models: Sequence[Served], name: str) -> Served:
    for model in models:
        if name in (model.name, model.model_id):
            return model
    served = ", ".join(repr(model.name) for model in models)
    raise NotFound(f"The model {name[:200]!r} does not exist; served are {served}", "model")


def _name_in(body: bytes) -> str | None:
    try:
        return _decode(body).model if body else None
    except msgspec.MsgspecError:  # the model's server refuses the body with its own message
        return None
