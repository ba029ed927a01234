"""Keys that are given twice in one object of a JSON body: decoders take the last value and say nothing."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

_Steps = tuple[str | int, ...]


class Repeated(NamedTuple):
    """A key given twice, and the keys and places in lists that lead to its object."""

    key: str
    steps: _Steps


class _Found(Exception):
    """Ends the reading of a body at the first repeated key."""


class _Pairs(list[tuple[str, Any]]):
    """An object as it is written."""


def repeated_key(text: str) -> Repeated | None:
    """Return the first key that an object of a JSON text gives twice, at any depth. Raises ValueError if it is no JSON,
    RecursionError if it is nested too deeply.

    Takes about as long as decoding the text. Runs Python for each object and number, so that other threads get on.
    """
    try:
        _CHECKING.decode(text)
    except _Found:
        return _first(_KEEPING.decode(text))
    return None


def _check(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        raise _Found


def _nothing(_: str) -> None:
    """A number's value does not matter; it may have more digits than Python converts."""


def _decoder(hook: Any) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=hook, parse_int=_nothing, parse_float=_nothing, parse_constant=_nothing, strict=False
    )


_CHECKING, _KEEPING = _decoder(_check), _decoder(_Pairs)


def _first(value: Any) -> Repeated | None:
    """The outermost of the repeated keys that comes first in the text."""
    level: list[tuple[_Steps, Any]] = [((), value)]
    while level:
        inner: list[tuple[_Steps, Any]] = []
        for steps, one in level:
            seen: set[str | int] = set()
            for key, child in one if isinstance(one, _Pairs) else enumerate(one):
                if key in seen:
                    return Repeated(str(key), steps)
                seen.add(key)
                if isinstance(child, list):
                    inner.append(((*steps, key), child))
        level = inner
    return None
