"""How a measurement is told: one JSON object a line on standard output, read by whoever started the process.

A figure is what the table shows. Between `ready` and `go` a process waits until what it times may run.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def tell(**what: Any) -> None:
    """Print a line."""
    print(json.dumps(what), flush=True)


def figure(shape: str, name: str, value: float, unit: str, *, less: bool | None = None, **detail: Any) -> None:
    """Tell a figure. `less`: whether less is better; it is, of times, if nothing is said."""
    tell(figure=name, shape=shape, value=value, unit=unit, less=unit in ("ms", "s") if less is None else less, **detail)


class Turn:
    """When the timed part of a process may run. With `waits` it is asked for and given back, else always.

    `alone`: nothing else is timed meanwhile; else others that are not alone may be.
    """

    def __init__(self, waits: bool, *, alone: bool = False) -> None:
        self._waits, self._alone = waits, alone

    def __enter__(self) -> None:
        if self._waits:
            tell(phase="alone" if self._alone else "shared")
            if not sys.stdin.readline():
                raise SystemExit("whoever started this has gone")

    def __exit__(self, *_: object) -> None:
        if self._waits:
            tell(phase="done")
