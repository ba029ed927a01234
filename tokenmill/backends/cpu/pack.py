"""Packing of weight matrices into the panels of `forms.py`.

Packing is lossless but for two roundings to float16: of scale · zero, where blocks of 4 bits have zeros of their own
(GPTQ, AWQ), and of the numbers of quantized matrices that no quantized form can store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.cpu.forms import BLOCK, BLOCK_FORMS, PAIRS, PANEL, Form, form_named, panel_bytes
from tokenmill.backends.cpu.scratch import padded, zeros
from tokenmill.errors import Unsupported
from tokenmill.program.ops import Weight
from tokenmill.quant.base import Coded, Reader, load_parts, stack
from tokenmill.quant.formats import FORMATS, nibbles, packed
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.weights.mapped import release

Array = NDArray[Any]
Allocate = Callable[..., Array]
"""(shape, dtype) -> a long-lived array of zeros"""

GATE = 32  # outputs of gate that alternate with as many of up
_AT_ONCE = 4 << 20  # numbers of which copies are made while they are packed
_LARGEST = 65504  # number of float16
_SHARED = 4 * BLOCK  # columns of blocks that share a scale and a low


@dataclass(frozen=True, slots=True)
class Packed:
    """The panels of a matrix or of some of its rows."""

    form: str  # a name of `forms.py`
    panels: NDArray[np.uint8]  # flat, 64-byte aligned
    rows: int
    columns: int
    start: int = 0  # index of the first row's output; a multiple of 32
    order: NDArray[np.intp] | None = (
        None  # (columns,): the activation that each column is multiplied with; None: its own
    )

    @property
    def address(self) -> int:
        """The address of the first panel."""
        return int(self.panels.ctypes.data)

    @property
    def count(self) -> int:
        """The number of panels. The last one is padded with outputs of zero."""
        return -(-self.rows // PANEL)

    @property
    def panel_bytes(self) -> int:
        """Bytes from panel to panel."""
        return panel_bytes(form_named(self.form), self.columns)

    @property
    def quantized(self) -> bool:
        """True if products with this matrix require int8 activations."""
        return self.form in BLOCK_FORMS


def gates(rows: int) -> bool:
    """Return True if a matrix of gate above up, `rows` in all, can be packed gated: its halves are whole blocks."""
    return rows % (2 * GATE) == 0


def pack_weight(
    weight: Weight,
    source: Checkpoint,
    read: Reader,
    rank: int = 0,
    *,
    gated: bool = False,
    pairs: bool = False,
    product: bool = False,
    allocate: Allocate = zeros,
) -> tuple[Packed, ...]:
    """Pack the part of a weight that `rank` holds.

    Returns several matrices, one below the other, if its parts differ in storage. All of them require the same kind of
    activations and begin at a multiple of 32 outputs. Raises Unsupported if the weight is `gated` and its halves are
    not whole blocks. `pairs`: pack bfloat16 in pairs (`Isa.pairs`). `product`: only products read the weight, so its
    form may depend on its numbers, and activations are reordered if all parts have one `Coded.order`. `allocate`:
    allocator of the arrays.
    """
    return pack_loaded(load_parts(weight, source, read, rank), gated, pairs, product, allocate)


def pack_loaded(
    parts: Sequence[Coded], gated: bool = False, pairs: bool = False, product: bool = False, allocate: Allocate = zeros
) -> tuple[Packed, ...]:
    """Pack the parts of a weight; arguments and result as of `pack_weight`."""
    if product:
        parts = [_narrowed(part) for part in parts]
    if product and (order := _common_order(parts)) is not None:
        found = _pack_runs([replace(part, order=None) for part in parts], gated, pairs, allocate)
        if all(packed.quantized for packed in found):
            return tuple(replace(packed, order=order) for packed in found)
    return _pack_runs(parts, gated, pairs, allocate)


def _common_order(parts: Sequence[Coded]) -> NDArray[np.intp] | None:
    """Return the order that all parts have; None if they have none, or different ones."""
    first = parts[0].order
    same = first is not None and all(p.order is not None and np.array_equal(p.order, first) for p in parts)
    return first if same else None


def _pack_runs(parts: Sequence[Coded], gated: bool, pairs: bool, allocate: Allocate) -> tuple[Packed, ...]:
    """Pack the parts of a weight: each run of those that are stored in the same way, or all together."""
    runs = [parts] if gated or len(parts) == 1 else _runs_of_one_layout(parts)
    out, start = list[Packed](), 0
    for run in runs:
        out.append(_pack_parts(run, gated, start, pairs, allocate))
        start += out[-1].rows
    if any(p.start % BLOCK for p in out) or len({p.quantized for p in out}) > 1:
        return (_pack_parts(parts, gated, 0, pairs, allocate),)
    return tuple(out)


def _pack_parts(parts: Sequence[Coded], gated: bool, start: int, pairs: bool, allocate: Allocate) -> Packed:
    """Pack matrices that are one below the other."""
    if _as_they_are(parts, gated):
        return _pack_dense([part.codes for part in parts], gated, start, pairs, allocate)
    return pack(stack(parts), gated=gated, start=start, pairs=pairs, allocate=allocate)


def _as_they_are(parts: Sequence[Coded], gated: bool) -> bool:
    """Return True if parts are of one unquantized type, and can be packed without being stacked before."""
    first = parts[0]
    if not first.dense or any(not part.dense or part.format != first.format for part in parts):
        return False
    rows = [part.shape[0] for part in parts]
    if gated and len(parts) > 1:
        return len(parts) == 2 and rows[0] == rows[1] and rows[0] % GATE == 0
    return all(n % PANEL == 0 for n in rows[:-1]) and (not gated or gates(rows[0]))


def _runs_of_one_layout(parts: Sequence[Coded]) -> list[list[Coded]]:
    """Divide the parts of a weight into runs that are stored in the same way."""
    runs: list[list[Coded]] = []
    for part in parts:
        if runs and runs[-1][0].layout() == part.layout():
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def pack(
    matrix: Coded, *, gated: bool = False, start: int = 0, pairs: bool = False, allocate: Allocate = zeros
) -> Packed:
    """Pack a matrix into panels.

    `gated`: the rows are gate, then up; 32 rows of gate then alternate with 32 of up. `pairs`: pack bfloat16 in pairs
    of columns. `allocate`: allocator of the array.
    """
    rows, columns = matrix.shape
    if gated and not gates(rows):
        raise Unsupported("size of a gated product", str(rows // 2), (), f"It must be a multiple of {GATE}.")
    blocks = _as_blocks(matrix)
    if blocks is None:
        return _pack_dense([matrix.codes if matrix.dense else _half(matrix)], gated, start, pairs, allocate)
    form = _form_of(blocks)
    out = allocate((-(-rows // PANEL), columns // (BLOCK * form.group), form.group_size))
    step = rows if gated else max(1, _AT_ONCE // columns // PANEL) * PANEL
    for first in range(0, rows, step):
        some = blocks.take(slice(first, first + step), slice(None)) if step < rows else blocks
        _put_blocks(form, some, out[first // PANEL : -(-(first + step) // PANEL)], gated)
        release(some.codes)
    return Packed(form.name, out.reshape(-1), rows, columns, start)


def _put_blocks(form: Form, blocks: Coded, out: Array, gated: bool) -> None:
    """Write rows to their panels (panels, groups of blocks, bytes)."""
    shift = _shift(form, blocks)
    body = out[..., form.factors :].reshape(*out.shape[:2], form.group, form.size)
    _write_codes(form, _panels(_codes(blocks, shift), gated), body[..., : form.codes])
    scale, low, *factors = _numbers(form, blocks, shift)
    _put(body[..., form.codes :], scale, gated)
    _put(body[..., form.codes + form.scales :], low, gated)
    for n, factor in enumerate(factors):
        _put(out[:, :, None, 2 * PANEL * n :], factor, gated)


def _half(matrix: Coded) -> Array:
    """Return the numbers of a quantized matrix in float16, or float32 if they are beyond its range."""
    numbers = matrix.floats()
    return numbers if np.abs(numbers).max(initial=0) > _LARGEST else numbers.astype(np.float16)


def pack_vector(vector: NDArray[np.float32], *, gated: bool = False) -> NDArray[np.float32]:
    """Arrange a bias in the order of a product's outputs, padded with zeros to a multiple of 16."""
    return padded(np.ascontiguousarray(_interleaved(vector) if gated else vector))


def _interleaved(a: Array) -> Array:
    return a.reshape(2, -1, GATE, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)


def _panels(a: Array, gated: bool) -> Array:
    """Reshape (rows, …) to (panels, 16, …), padding with zeros."""
    if gated:
        a = _interleaved(a)
    if short := -len(a) % PANEL:
        a = np.concatenate([a, np.zeros((short, *a.shape[1:]), a.dtype)])
    return a.reshape(-1, PANEL, *a.shape[1:])


def _pack_dense(parts: Sequence[Array], gated: bool, start: int, pairs: bool, allocate: Allocate) -> Packed:
    """Pack matrices that are one below the other. Each number is copied once."""
    names = {"uint16": PAIRS.name if pairs else "bf16", "float16": "f16", "float32": "f32"}
    parts = [part if part.dtype.name in names else part.astype(np.float32) for part in parts]
    rows, columns = sum(map(len, parts)), parts[0].shape[1]
    form, paired = names[parts[0].dtype.name], names[parts[0].dtype.name] == PAIRS.name
    width = columns + columns % 2 if paired else columns
    out = allocate((-(-rows // PANEL), width * PANEL), parts[0].dtype)
    if paired and columns % 2:
        parts = [np.concatenate([part, np.zeros((len(part), 1), part.dtype)], 1) for part in parts]
    wide = [np.ascontiguousarray(part).view(np.uint32) if paired else part for part in parts]
    panels = out.view(wide[0].dtype).reshape(len(out), -1, PANEL)
    if gated and len(parts) == 1:
        wide = list(wide[0].reshape(2, rows // 2, -1))
    if gated:
        pairs_of_blocks = panels.reshape(-1, 2, GATE // PANEL, *panels.shape[1:])
        for which, part in enumerate(wide):
            pairs_of_blocks[:, which] = part.reshape(-1, GATE // PANEL, PANEL, part.shape[1]).swapaxes(-1, -2)
    else:
        _put_panels(wide, panels)
    return Packed(form, out.reshape(-1).view(np.uint8), rows, columns, start)


def _put_panels(parts: Sequence[Array], panels: Array) -> None:
    """Write matrices one below the other to panels (panels, columns, 16). All but the last have whole panels."""
    first = 0
    for part in parts:
        whole, rest = divmod(len(part), PANEL)
        columns = part.shape[1]
        panels[first : first + whole] = part[: whole * PANEL].reshape(whole, PANEL, columns).swapaxes(1, 2)
        first += whole
        if rest:
            panels[first, :, :rest] = part[whole * PANEL :].T


# ---- blocks ----


def _as_blocks(matrix: Coded) -> Coded | None:
    """Return the matrix with a scale for each 32 columns, 16 as in Q6_K, or 128; None if no form can store it."""
    columns = matrix.shape[1]
    matrix = _as_integers(matrix)
    if matrix.scale is None or matrix.order is not None or columns % BLOCK or not FORMATS[matrix.format].integer:
        return None
    if matrix.block == (1, BLOCK) or (matrix.block == (1, BLOCK // 2) and matrix.levels is not None):
        return matrix
    width = matrix.block[1] or columns
    if width % BLOCK:
        return None
    by_rows, each = matrix.by_rows(), _SHARED if _shares(matrix, width) else BLOCK
    if width == each:
        return by_rows

    def repeated(numbers: Array | None) -> Array | None:
        if numbers is None or (numbers is by_rows.zero and numbers.shape == (1, 1)):
            return numbers
        return np.repeat(numbers, width // each, 1)[:, : columns // each]

    return replace(
        by_rows, scale=repeated(by_rows.scale), zero=repeated(by_rows.zero), low=repeated(by_rows.low),
        block=(1, each), levels=None,
    )  # fmt: skip


def _shares(m: Coded, width: int) -> bool:
    """Return True if four blocks can share a scale and a low."""
    half = m.scale is not None and m.scale.dtype == np.float16 and m.low is None and FORMATS[m.format].bits <= 4
    return half and _zero(m) is None and width % _SHARED == 0 and m.shape[1] % _SHARED == 0 and _products_fit(m)


def _narrowed(m: Coded) -> Coded:
    """Return the same with scales in float16, if that changes none: bfloat16, as which some are stored, is narrower."""
    if m.scale is None or m.scale.dtype != np.float32 or m.levels is not None:
        return m
    with np.errstate(over="ignore"):
        half = m.scale.astype(np.float16)
    return replace(m, scale=half) if np.array_equal(half, m.scale) else m


def _as_integers(m: Coded) -> Coded:
    """Return a matrix whose codes stand for integers of a table with these integers as codes; any other unchanged."""
    found = FORMATS[m.format].integers
    if found is None:
        return m
    name, table = found
    codes = np.concatenate([m.codes & 15, m.codes >> 4], -1) if packed(m.codes, m.format) else m.codes
    return replace(m, codes=table[codes], format=name)


def _zero(m: Coded) -> float | None:
    """Return the zero of all blocks; None if they differ."""
    if m.zero is None:
        return 0.0
    return float(m.zero[0, 0]) if m.zero.shape == (1, 1) else None


_EVEN = {"i3": 0, "u4": 8, "u5": 16, "i5": 0, "i6": 0, "i8": 0}
"""Format -> the zero with which a form without addends can store it"""


def _form_of(m: Coded) -> Form:
    bits, zero = FORMATS[m.format].bits, _zero(m)
    if m.levels is not None:
        return BLOCK_FORMS[f"int{bits}k"]
    name = f"int{8 if bits == 6 else max(4, bits)}"
    half = m.scale is not None and m.scale.dtype == np.float16
    if m.block[1] == _SHARED:
        return BLOCK_FORMS["int4group"]
    if half and zero is None and m.low is None and bits <= 4 and _products_fit(m):
        return BLOCK_FORMS["int4"]
    if m.low is not None:
        narrow = half and m.low.dtype == np.float16 and m.format in ("u4", "u5")
        return BLOCK_FORMS[name if narrow and zero == 0 else f"{name}wide"]
    even = name if bits in (6, 8) else f"{name}even"
    return BLOCK_FORMS[even if half and zero == _EVEN[m.format] else f"{name}wide"]


def _products_fit(m: Coded) -> bool:
    """Return True if scale · zero is within the range of float16."""
    assert m.scale is not None
    return float(np.abs(m.scale).max(initial=0)) * 16 <= _LARGEST


def _shift(form: Form, m: Coded) -> int:
    """Return the number that makes the codes unsigned, as panels store them, when added."""
    if m.format.startswith("u"):
        return 0
    return form.offset or 1 << form.bits - 1


def _codes(m: Coded, shift: int) -> Array:
    """Return (rows, blocks of 32, 16) bytes of nibbles, or (rows, blocks of 32, 32) unsigned codes."""
    if packed(m.codes, m.format):
        return m.codes
    codes = m.codes.reshape(len(m.codes), -1, BLOCK).view(np.uint8) + np.uint8(shift)
    return nibbles(codes) if FORMATS[m.format].bits <= 4 else np.asarray(codes)


def _numbers(form: Form, m: Coded, shift: int) -> tuple[Array | None, ...]:
    """Return scales, lows and the factors of both, each (rows, number for a row), in the types of the form."""
    if m.levels is not None:
        return m.levels.scale, m.levels.low, m.levels.scale_factor, m.levels.low_factor
    assert m.scale is not None
    kinds = {2: np.float16, 4: np.float32}
    scale = m.scale.astype(kinds[form.scale or 2], copy=False)
    if not form.adds:
        return scale, None
    # scale · (code − zero) + low = scale · (stored − form.offset) + (low − scale · above)
    above = (0 if m.zero is None else m.zero.astype(np.float32)) + np.float32(shift - form.offset)
    low = np.zeros_like(scale) if m.low is None else m.low
    if np.any(above):
        low = low - scale.astype(np.float32) * above
    low = low.astype(kinds[form.low or 2], copy=False)
    return (scale, low) if form.scale else (None, None, scale, low)


def _write_codes(form: Form, codes: Array, out: Array) -> None:
    """Write codes (panels, 16, blocks, 16 bytes of nibbles or 32 codes) to planes (panels, groups, blocks, bytes)."""
    shape = out.shape[:3]
    fours = np.ascontiguousarray(codes) if codes.strides[-1] != 1 else codes
    quads = fours.view(np.uint32).transpose(0, 2, 3, 1)  # (panels, blocks, vector, output) of 4 columns each
    if form.bits in (4, 8):
        quads = quads.reshape(*shape, -1, PANEL)
        out.view(np.uint32).reshape(quads.shape)[:] = quads
        return
    vectors = np.ascontiguousarray(quads).view(np.uint8).reshape(*shape, 8, 64)
    planes = out.reshape(*shape, form.bits, 64)
    low, high, each = vectors & 15, vectors >> 4, form.bits - 4
    planes[..., :4, :] = low[..., :4, :] | low[..., 4:, :] << 4
    for j in range(8):
        plane, place = divmod(j, 8 // each)
        planes[..., 4 + plane, :] |= high[..., j, :] << np.uint8(each * place)


def _put(out: Array, numbers: Array | None, gated: bool) -> None:
    """Write numbers (rows, number for a row) to the first bytes of out (panels, groups, blocks, bytes)."""
    if numbers is None:
        return
    panels = _panels(numbers, gated).reshape(out.shape[0], PANEL, *out.shape[1:3], -1)
    ordered = np.ascontiguousarray(panels.transpose(0, 2, 3, 4, 1))
    raw = ordered.view(np.uint8).reshape(*out.shape[:3], -1)
    out[..., : raw.shape[-1]] = raw
