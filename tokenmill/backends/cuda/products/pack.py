"""Packing of quantized matrices on the device, from the stored form to the one that kernels read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.cuda.products import layout
from tokenmill.backends.cuda.products.coded import CodedMatrix, Lookup
from tokenmill.backends.cuda.products.forms import ROWS, Form, form_of, shift
from tokenmill.backends.cuda.products.tables import lookup
from tokenmill.quant import formats
from tokenmill.quant.base import Coded
from tokenmill.quant.formats import FORMATS

_AT_ONCE = 1 << 24  # codes arranged at a time, in several copies of 16 bits each

Upload = Callable[[NDArray[Any]], Tensor]
"""Copy an array to the device: its numbers, or for types that torch does not have, their bytes."""


def packed(parts: Sequence[Coded], upload: Upload, dtype: torch.dtype) -> CodedMatrix:
    """Return stacked matrices packed for computation in `dtype`, 16 bits.

    Raise Unpackable with the reason if no form holds them.
    """
    form, first = form_of(parts), parts[0]
    codes = _codes(parts, form, upload)
    meta, factor = _words([part.by_rows() for part in parts], form, upload, dtype == torch.float16)
    table = FORMATS[first.format].table
    found = None
    if form.kind == "table" and table is not None:
        found = Lookup(lookup(first.format, dtype == torch.float16), upload(table))
    order = None if first.order is None else upload(first.order.astype(np.int32))
    return CodedMatrix(form, (sum(part.shape[0] for part in parts), first.shape[1]), codes, meta, factor, found, order)


def _codes(parts: Sequence[Coded], form: Form, upload: Upload) -> Tensor:
    """Return the packed codes of stacked matrices."""
    rows, out, done = sum(part.shape[0] for part in parts), None, 0
    for some in _chunks(parts, form, upload):
        paired = form.kind == "table"
        made = layout.pack4(some, form.depth, paired=paired) if form.slices == 4 else layout.pack8(some, form.depth)
        if out is None:
            out = torch.empty(-(-rows // ROWS), *made.shape[1:], dtype=made.dtype, device=made.device)
        out[done : done + len(made)] = made
        done += len(made)
    assert out is not None, "a matrix has rows"
    return out


def _chunks(parts: Sequence[Coded], form: Form, upload: Upload) -> Iterator[Tensor]:
    """Yield codes (rows, columns), so few that arranging them takes little memory: whole groups, but for the last."""
    columns = parts[0].shape[1]
    step, left = max(ROWS, _AT_ONCE // columns // ROWS * ROWS), None
    for part in parts:
        for first in range(0, part.shape[0], step):
            codes = _centred(upload(part.codes[first : first + step]), part, form).view(-1, columns)
            codes = codes if left is None else torch.cat((left, codes))
            whole = len(codes) // ROWS * ROWS
            left = codes[whole:] if whole < len(codes) else None
            if whole:
                yield codes[:whole]
    if left is not None:
        yield left


def _centred(stored: Tensor, coded: Coded, form: Form) -> Tensor:
    """Return the codes of the form, 8 bits each, in the order of the columns."""
    known = FORMATS[coded.format]
    if formats.packed(coded.codes, coded.format):
        stored = torch.stack((stored & 15, stored >> 4), -2)
    if form.kind not in ("int4", "int8"):
        return stored
    if known.integers is not None:
        return torch.from_numpy(known.integers[1]).to(stored.device)[stored.int()]
    less = shift(coded, form) - (8 if form.kind == "int4" and form.meta != "zero" else 0)
    codes = stored if stored.dtype == torch.int8 or known.bits < 8 else stored.to(torch.int16)
    return (codes - less).to(torch.uint8 if form.kind == "int4" else torch.int8)


def _words(parts: Sequence[Coded], form: Form, upload: Upload, half: bool) -> tuple[Tensor, float]:
    """Return the words of scales, or the scales of rows, and the factor of all. `parts` have scales of rows."""
    numbers = [_numbers(part, form, upload) for part in parts]
    scale = torch.cat([each[0] for each in numbers])
    if form.meta == "row":
        return torch.nn.functional.pad(scale[:, 0], (0, -len(scale) % ROWS)).contiguous(), 1.0
    added = torch.cat([each[1] for each in numbers]) if form.meta in ("zero", "low") else None
    zero, low = (added, None) if form.meta == "zero" else (None, added)
    factor = 1.0 if form.meta == "scale" and form.block == form.group else layout.scale_factor(scale, low)
    return layout.pack_words(form, scale / factor, zero, None if low is None else low / factor, half), factor


def _numbers(coded: Coded, form: Form, upload: Upload) -> tuple[Tensor, Tensor]:
    """Return scales (rows, groups of the form), and zero points or addends."""
    assert coded.scale is not None
    columns, width, known = coded.shape[1], coded.block[1], FORMATS[coded.format]
    scale = upload(coded.scale).float()
    if form.meta == "row":
        return (2 * scale if coded.format == "e2m1x2" else scale), scale
    zeros = None if coded.zero is None else upload(np.broadcast_to(coded.zero, coded.scale.shape).astype(np.float32))
    centre = float(shift(coded, form))
    if form.meta == "zero":
        added = torch.zeros_like(scale) if zeros is None else zeros - centre
    else:
        added = scale * (centre - (0.0 if zeros is None else zeros)) if known.integer else torch.zeros_like(scale)
        added = added if coded.low is None else added + upload(coded.low).float()
    if coded.format == "e2m1x2" and form.kind == "e2m1":
        scale = 2 * scale
    return layout.spread(scale, form, columns, width), layout.spread(added, form, columns, width)
