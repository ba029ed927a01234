"""Detect duplicate keys in the objects of a JSON body, because decoders silently take the last value."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

_Steps = tuple[str | int, ...]


class Repeated(NamedTuple):
    """Duplicate key, and the keys and indices that lead to its object."""

    key: str
    steps: _Steps


class _Found(Exception):
    """Exception that ends the decoding of a body at the first duplicate key."""


class _Pairs(list[tuple[str, Any]]):
    """Object as its list of key-value pairs."""


def repeated_key(text: str) -> Repeated | None:
    """Return the first duplicate key of an object in a JSON text, at any depth; None if there is none.

    Raises ValueError if the text is not JSON, RecursionError if it is nested too deeply. Takes about as long as
    decoding the text. Python code runs for each object and number, so that other threads are not blocked.
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
    """Discard a number, because its value does not matter and it may have more digits than Python converts."""


def _decoder(hook: Any) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=hook, parse_int=_nothing, parse_float=_nothing, parse_constant=_nothing, strict=False
    )


_CHECKING, _KEEPING = _decoder(_check), _decoder(_Pairs)


def _first(value: Any) -> Repeated | None:
    """Return the outermost duplicate key that comes first in the text."""
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
