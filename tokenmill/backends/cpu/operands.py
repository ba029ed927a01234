"""What tiles of every kind of weights work on: addresses, and how a panel's 16 outputs are divided among registers."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.backends.cpu.ir import Emitter, Val

_FAR = 1 << 15


@dataclass(frozen=True, slots=True)
class Operands:
    """Addresses and strides in bytes of a tile's operands; `scales` stays unread with float activations."""

    columns: Val
    weight: Val
    x: Val
    x_stride: Val
    scales: Val
    scales_stride: Val
    base: Val  # what is added to the product: float32, 16 a row
    base_stride: Val
    out: Val
    out_stride: Val


def panel_parts(lanes: int, rows: int, parts_per_pass: int) -> list[list[int]]:
    """Which registers of a panel's 16 outputs are summed in one go over the columns; `at_once`: how many, with rows."""
    parts = list(range(16 // lanes))
    if rows == 1 or lanes == 16:
        return [parts]
    return [parts[i : i + parts_per_pass] for i in range(0, len(parts), parts_per_pass)]


def prefetch_distance(g: Emitter, rows: int, panel: Val) -> Val:
    """Where to ask for weights early, from those that are read: the same place of the next panel, or so far in a panel
    that does not fit a near cache. What was fastest: a single row waits for nothing but memory, and the panel behind
    a thread's last is another's, so what is read of it twice is time lost. `panel`: its bytes.
    """
    if rows == 1:
        return g.c(2048)
    return g.b.select(g.b.icmp_unsigned("<", panel, g.c(_FAR)), panel, g.c(_FAR))


def store(g: Emitter, o: Operands, sums: list[Val], offset: int) -> None:
    """Each row's sums, plus its base, to out."""
    b = g.b
    for r, total in enumerate(sums):
        base = g.ld(total.type, g.at(o.base, b.mul(o.base_stride, g.c(r))), offset)
        g.st(b.fadd(total, base), g.at(o.out, b.mul(o.out_stride, g.c(r))), offset)
