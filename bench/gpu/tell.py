"""Report a measurement to the parent process: one JSON object per line on standard output.

Figures are shown in the table. Before a timed section, a process waits until the parent has acquired the host for it.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def tell(**what: Any) -> None:
    """Print a line."""
    print(json.dumps(what), flush=True)


def figure(shape: str, name: str, value: float, unit: str, *, less: bool | None = None, **detail: Any) -> None:
    """Print a figure. `less`: True if less is better; None: True for times."""
    tell(figure=name, shape=shape, value=value, unit=unit, less=unit in ("ms", "s") if less is None else less, **detail)


class Turn:
    """Context of a timed section. `waits`: True to acquire the host from the parent process first.

    `alone`: True for exclusive use; False to share the host with other sections that are not exclusive.
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
