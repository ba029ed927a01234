"""Choice of the kernel of a sum over the ranks by its size, from a measurement at the start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

_log = logging.getLogger(__name__)
Us = float


class Limits(NamedTuple):
    """Bytes of a sum up to which a kernel is used: one shot, then two, then the library's (NCCL).

    `measured`: False for the numbers that were best for two to eight cards with NVLink elsewhere.
    """

    one_shot: int
    two_shots: int
    measured: bool = False

    def __str__(self) -> str:
        last = f"two shots up to {_bytes(self.two_shots)}, NCCL above" if self.two_shots < NEVER else "two shots above"
        return f"one shot up to {_bytes(self.one_shot)}, {last}"


NEVER = 1 << 60
_ONE_SHOT = {2: 1 << 20, 4: 512 << 10, 8: 256 << 10}
_TWO_SHOTS = 8 << 20
SIZES = tuple(8 << 10 + 2 * i for i in range(6))  # bytes that are measured: 8 KiB to 8 MiB


def usual(size: int, library: bool) -> Limits:
    """Return the limits without a measurement. `library`: NCCL is there."""
    one = _ONE_SHOT[min((n for n in _ONE_SHOT if n >= size), default=8)]
    return Limits(one, _TWO_SHOTS if library else NEVER)


def measured(
    time_of: Mapping[str, Callable[[int], Us | None]], worst: Callable[[Sequence[Us]], list[Us]], sizes: Sequence[int]
) -> Limits:
    """Measure the kernels and return the limits, the same on all ranks.

    `time_of`: by name, "one shot", "two shots" and, if it is there, "NCCL": bytes -> microseconds, None if it cannot.
    `worst`: the largest of all ranks' times.
    """
    table: dict[str, list[Us]] = {}
    for name, each in time_of.items():
        found = [each(size) for size in sizes]
        table[name] = worst([NEVER if us is None else us for us in found])
    _log.info("Sums over the ranks, µs by bytes: %s.", "; ".join(_row(name, sizes, us) for name, us in table.items()))
    limits = _limits(table, sizes)
    _log.info("Sums over the ranks: %s.", limits)
    return limits


def _limits(table: Mapping[str, Sequence[Us]], sizes: Sequence[int]) -> Limits:
    """Return the limits under which the fastest kernel of each measured size is used, up to its last win in a row."""
    best = [min(table, key=lambda name: table[name][i]) for i in range(len(sizes))]
    one = max((size for i, size in enumerate(sizes) if set(best[: i + 1]) == {"one shot"}), default=0)
    own = max((size for i, size in enumerate(sizes) if "NCCL" not in best[: i + 1]), default=0)
    return Limits(one, own if "NCCL" in best else NEVER, measured=True)


def _row(name: str, sizes: Sequence[int], times: Sequence[Us]) -> str:
    parts = (f"{_bytes(size)} {us:.0f}" for size, us in zip(sizes, times, strict=True) if us < NEVER)
    return f"{name} {', '.join(parts)}"


def _bytes(n: int) -> str:
    return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB"
