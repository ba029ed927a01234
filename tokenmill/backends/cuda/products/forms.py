"""Forms in which quantized matrices lie on the device: which one a `Coded` takes, or why none. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tokenmill.quant.base import Coded
from tokenmill.quant.formats import FORMATS

ROWS = 16  # rows whose codes of a block are adjacent
DEPTH = 64  # columns of a slice, unless a group is smaller
_LEAST = 16  # columns of a group: the least depth of a product on tensor cores


class Unpackable(Exception):
    """Reason for which no form holds a matrix."""


class Form(NamedTuple):
    """Form of a packed matrix.

    `kind`: how kernels make a number of a code: int4, int8 (signed integers), e2m1, e4m3, e5m2 (by moving bits), table
    (16 numbers). `meta`: what codes are combined with: row (a scale a row), or for each `group` of columns scale, zero
    (a scale, and an integer subtracted before) or low (a scale, and a number added after). `depth`: columns of a slice.
    """

    kind: str
    meta: str
    group: int
    depth: int

    @property
    def slices(self) -> int:
        """Number of codes in an element of 16 bits."""
        return 4 if self.kind in ("int4", "e2m1", "table") else 2

    @property
    def block(self) -> int:
        """Number of columns of a block: slices of `depth`."""
        return self.slices * self.depth

    @property
    def words(self) -> int:
        """Number of 32-bit words that a row has for each block: see `layout.pack_words`."""
        if self.meta == "row":
            return 0
        groups = self.block // self.group
        return groups if self.meta != "scale" else -(-groups // 2)

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a matrix."""
        blocks, padded = -(-columns // self.block), -(-rows // ROWS) * ROWS
        scales = 4 * padded if self.meta == "row" else blocks * self.words * 4 * padded
        return padded * blocks * self.depth * 2 + scales

    def __str__(self) -> str:
        """Return the form as logs and reports name it."""
        scales = "a scale a row" if self.meta == "row" else f"groups of {self.group}"
        more = {"zero": " with zero points", "low": " with minima"}.get(self.meta, "")
        return f"{self.kind}, {scales}{more}"


def form_of(parts: Sequence[Coded]) -> Form:
    """Return the form of matrices stacked in one. Raise Unpackable with the reason if there is none.

    Integers of unlike widths, groups or zero points become the widest codes with the smallest groups, all exactly.
    """
    if any(part.dense for part in parts):
        raise Unpackable(
            "it is not quantized" if all(part.dense for part in parts) else "a part of it is not quantized"
        )
    orders = {None if part.order is None else part.order.tobytes() for part in parts}
    if len(orders) > 1:
        raise Unpackable("its parts have their columns in unlike orders")
    found = [_form_of(part) for part in parts]
    names = {part.format for part in parts}
    if len(set(found)) == 1 and (found[0].kind != "table" or len(names) == 1):
        return found[0]
    if not all(FORMATS[name].integer or FORMATS[name].integers is not None for name in names):
        raise Unpackable(f"its parts are stored in unlike formats, {', '.join(sorted(names))}")
    kind = "int4" if all(form.kind == "int4" for form in found) else "int8"
    depth = min(form.depth for form in found)
    joined = Form(kind, "low", 0, depth)
    return joined._replace(group=min(joined.block, *(form.group or joined.block for form in found)))


def _form_of(coded: Coded) -> Form:
    """Return the form of a matrix alone."""
    kind, meta = _kind(coded), _meta(coded)
    columns, width = coded.shape[1], coded.block[1]
    whole = width == 0 or width >= columns
    if meta == "scale" and whole:
        return Form(kind, "row", 0, DEPTH)
    each = 1 << 30 if whole else width & -width  # the largest power of two that divides the group
    if each < _LEAST:
        raise Unpackable(f"its groups of {width} columns are no multiple of {_LEAST}")
    form = Form(kind, meta, 0, min(DEPTH, each))
    return form._replace(group=min(each, form.block))


def _kind(coded: Coded) -> str:
    name, known = coded.format, FORMATS[coded.format]
    if coded.scale is None:
        raise Unpackable("it has no scales")
    if known.integer:
        return "int4" if known.bits <= 4 else "int8"
    if coded.zero is not None or known.table is None or known.bits not in (4, 8):
        raise Unpackable(f"no kernel multiplies {name}")
    if known.bits == 4:
        return "e2m1" if name.startswith("e2m1") else "table"
    if name not in ("e4m3", "e5m2"):
        raise Unpackable(f"no kernel multiplies {name}")
    return name


def _meta(coded: Coded) -> str:
    if coded.low is not None:
        return "low"
    zero = coded.zero
    if zero is None or zero.size == 1:
        return "low" if _shift(coded) is None else "scale"
    codes = least(coded.format)
    integers = np.array_equal(zero, np.rint(zero)) and zero.min() >= codes and zero.max() <= codes + 127
    return "zero" if integers else "low"


def least(name: str) -> int:
    """Return the least code of an integer format."""
    return -(1 << FORMATS[name].bits - 1) if name.startswith("i") else 0


def middle(name: str) -> int:
    """Return the middle of an integer format's codes."""
    return least(name) + (1 << FORMATS[name].bits - 1)


def _shift(coded: Coded) -> int | None:
    """Return the number to subtract from every code; None if the differences have no room in the form's codes."""
    known = FORMATS[coded.format]
    if known.table is not None:
        return 0
    zero = 0.0 if coded.zero is None else float(coded.zero.reshape(-1)[0])
    first, half = least(coded.format) - zero, 8 if known.bits <= 4 else 128
    fits = zero == round(zero) and -half <= first and first + (1 << known.bits) <= half
    return round(zero) if fits else None


def shift(coded: Coded, form: Form) -> int:
    """Return the number to subtract from every code of integers, so that they have room in the form's codes."""
    if FORMATS[coded.format].table is not None:  # whose integers are centred already
        return 0
    if form.meta in ("scale", "row"):
        found = _shift(coded)
        assert found is not None
        return found
    if form.meta == "zero" and form.kind == "int4":  # whose kernels count from the least code
        return least(coded.format)
    return middle(coded.format)
