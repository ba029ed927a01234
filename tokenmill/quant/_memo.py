"""Values that are computed once for each open checkpoint, and forgotten with it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from tokenmill.weights.checkpoint import Checkpoint

T = TypeVar("T")

_VALUES: WeakKeyDictionary[Checkpoint, dict[Hashable, Any]] = WeakKeyDictionary()


def once(source: Checkpoint, key: Hashable, make: Callable[[], T]) -> T:
    """Return the value of `make`, which is called for the first request only. It must not refer to the checkpoint.

    Thread-safe: two threads may both call `make`, and then use either value.
    """
    values = _VALUES.setdefault(source, {})
    if key not in values:
        values[key] = make()
    value: T = values[key]
    return value
