"""Operands that tiles of all weight forms share, and the division of a panel's 16 outputs among registers."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.backends.cpu.ir import Emitter, Val

_FAR = 1 << 15  # the maximum prefetch distance in bytes: a larger panel does not fit a near cache


@dataclass(frozen=True, slots=True)
class Operands:
    """Addresses of a tile's operands and their strides in bytes. `scales` is unused with float activations."""

    columns: Val
    weight: Val
    x: Val
    x_stride: Val
    scales: Val
    scales_stride: Val
    base: Val  # added to the product: float32, 16 for each row
    base_stride: Val
    out: Val
    out_stride: Val


def panel_parts(lanes: int, rows: int, parts_per_pass: int) -> list[list[int]]:
    """Divide the registers of a panel's 16 outputs into passes over the columns.

    A single row and 16-lane registers need one pass. Otherwise a pass computes `parts_per_pass` registers.
    """
    parts = list(range(16 // lanes))
    if rows == 1 or lanes == 16:
        return [parts]
    return [parts[i : i + parts_per_pass] for i in range(0, len(parts), parts_per_pass)]


def prefetch_distance(g: Emitter, rows: int, panel: Val) -> Val:
    """Return the prefetch distance in bytes: one panel ahead, at most _FAR. `panel`: bytes of a panel.

    Distances were chosen by measurement. A single row is bound by memory alone, so it uses a short distance:
    prefetching beyond a thread's last panel reads weights that another thread reads too.
    """
    if rows == 1:
        return g.c(2048)
    return g.b.select(g.b.icmp_unsigned("<", panel, g.c(_FAR)), panel, g.c(_FAR))


def store(g: Emitter, o: Operands, sums: list[Val], offset: int) -> None:
    """Store the sums of each row plus its base."""
    b = g.b
    for r, total in enumerate(sums):
        base = g.ld(total.type, g.at(o.base, b.mul(o.base_stride, g.c(r))), offset)
        g.st(b.fadd(total, base), g.at(o.out, b.mul(o.out_stride, g.c(r))), offset)
