"""Which cases of a test run always, and which with `--slow` only."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Return `cases` for parametrize. All but those in `always`, which must be among them, are marked slow."""
    cases = list(cases)
    missing = [case for case in always if case not in cases]
    assert not missing, f"no such cases: {missing}"
    return [case if case in always else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
