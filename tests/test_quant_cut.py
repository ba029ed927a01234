"""Columns of stored matrices that ranks hold, with zeros between them, in every form."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from support_quant_table import STORED, read_back
from support_slow import mostly_slow
from test_gguf import TYPES, stored
from test_quant_stored import CASES

from tokenmill.program.share import Span
from tokenmill.quant import eetq, fp8, int4, int8
from tokenmill.quant.coded import Coded, dense
from tokenmill.quant.cut import Cut, cut
from tokenmill.quant.gguf import UNPACK

MADE = {"int4": int4.blocks, "int8": int8.blocks, "fp8": fp8.by_rows, "eetq": eetq.by_rows}
FORMS = [*CASES, *TYPES, *MADE, *mostly_slow([f"stored {i}" for i in range(len(STORED))], ("stored 6",))]


def matrix(name: str) -> Coded:
    """Return a matrix of 256 or 512 columns in a form."""
    if name.startswith("stored "):
        _, _, about, write = STORED[int(name.removeprefix("stored "))]
        return read_back(about, write)
    if name in CASES:
        return read_back(*CASES[name])
    floats = np.random.default_rng(1).normal(size=(24, 512)).astype(np.float32)
    if name in MADE:
        return MADE[name](floats.reshape(24, 16, 32) if name in ("int4", "int8") else floats)
    kind = gguf.GGMLQuantizationType[name]
    raw = stored(kind, floats)
    if name not in UNPACK:
        return dense(gguf.quants.dequantize(raw, kind))
    return UNPACK[name](raw.reshape(24, -1, gguf.GGML_QUANT_SIZES[kind][1]))


def spans_of(step: int, columns: int, padded: bool, rng: np.random.Generator) -> tuple[Span, ...]:
    """Return a few spans, in any order, with zeros between them."""
    starts = rng.integers(0, columns // step, 3) * step
    spans = [Span(int(at), int(rng.integers(1, (columns - at) // step + 1)) * step) for at in starts]
    return (spans[0], Span(-1, step), *spans[1:]) if padded else tuple(spans)


@pytest.mark.parametrize("name", FORMS)
def test_columns_and_zeros_are_those_of_the_whole_matrix_in_a_form_that_depends_on_no_rank(name: str) -> None:
    whole, rng = matrix(name), np.random.default_rng(3)
    floats = whole.floats()
    for step in (8, 16, 32, 64, 96, 256):
        for padded in (False, True):
            forms = set()
            for _ in range(2):
                spans = spans_of(step, whole.shape[1], padded, rng)
                got = cut(whole, Cut(spans, step, padded))
                zeros = {span: np.zeros((len(floats), span.size), np.float32) for span in spans if span.empty}
                parts = [zeros.get(s, floats[:, s.first : s.first + s.size]) for s in spans]
                np.testing.assert_array_equal(got.floats(), np.concatenate(parts, 1))
                forms.add((got.format, got.block, got.levels is None, got.group, got.zero is None))
            assert len(forms) == 1
            assert not (forms.pop()[0] == "f32" and step >= 32 and whole.order is None and not whole.dense)
