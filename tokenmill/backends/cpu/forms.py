"""How weights lie in memory: panels of 16 outputs, of blocks one layout for every instruction set.

A block form holds, for each 32 columns of a panel, in this order:

* codes, unsigned, in planes of 64 bytes. Byte v of vector j stands for output v // 4 and column 4 · j + v % 4.
  4 bits: four vectors of nibbles, low ones vectors j = 0 … 3, high ones j = 4 … 7.
  5 bits: the same, then a plane whose bit j is bit 4 of vector j's byte.
  6 bits: the same, then two planes, of vectors 0 … 3 and 4 … 7, with two bits for each vector.
  8 bits: eight vectors.
* a scale for each output, twice if scales belong to 16 columns;
* what is added for each output (`low`), if the form has it. Else `offset` is subtracted from every code.

A weight is scale · (code − offset) + low. In forms of two levels (GGUF's K types) scales and lows are int8, and in
front of every eight blocks stand float16 factors of each output: of the scales, then of the lows.

Dense forms hold, for each column, one number for each of the 16 outputs. Instruction sets that multiply bfloat16 as
such have it in pairs: for each two columns, two numbers for each of the 16 outputs; an odd last column is paired with
zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

PANEL = 16  # outputs of a panel
BLOCK = 32  # columns that share an activation's scale


@dataclass(frozen=True, slots=True)
class Form:
    """A layout of quantized weights."""

    name: str
    bits: int  # of a code: 4, 5, 6 or 8
    scale: int  # bytes of a scale: 1, 2 or 4 (int8, float16, float32)
    low: int = 0  # bytes of what is added: 0 (nothing), 1, 2 or 4
    offset: int = 0
    halves: int = 1  # 2: scales of 16 columns

    @property
    def codes(self) -> int:
        """Bytes of the codes of 32 columns of a panel."""
        return 64 * self.bits

    @property
    def scales(self) -> int:
        """Where the scales begin is `codes`; their bytes."""
        return PANEL * self.scale * self.halves

    @property
    def size(self) -> int:
        """Bytes of 32 columns of a panel, factors apart."""
        return self.codes + self.scales + PANEL * self.low

    @property
    def group(self) -> int:
        """Blocks that share factors."""
        return 8 if self.scale == 1 else 1

    @property
    def factors(self) -> int:
        """Bytes in front of each group."""
        return 2 * PANEL * (1 + (self.low > 0)) if self.group > 1 else 0

    @property
    def group_size(self) -> int:
        """Bytes of a group of blocks."""
        return self.factors + self.group * self.size


@dataclass(frozen=True, slots=True)
class DenseForm:
    """A layout of floats."""

    name: str
    item: int  # bytes of a number
    together: int = 1  # columns whose numbers for an output lie side by side

    @property
    def size(self) -> int:
        """Bytes of a column of a panel."""
        return PANEL * self.item

    @property
    def group_size(self) -> int:
        """Bytes of the columns that lie together."""
        return self.together * self.size


BLOCK_FORMS = {
    form.name: form
    for form in (
        Form("int4", 4, scale=2, low=2),  # Q4_1
        Form("int4even", 4, scale=2, offset=8),  # Q4_0, int4 made at load
        Form("int4wide", 4, scale=4, low=4),  # scales or zeros that float16 does not hold
        Form("int4k", 4, scale=1, low=1),  # Q4_K
        Form("int5", 5, scale=2, low=2),  # Q5_1
        Form("int5even", 5, scale=2, offset=16),  # Q5_0
        Form("int5wide", 5, scale=4, low=4),
        Form("int5k", 5, scale=1, low=1),  # Q5_K
        Form("int6k", 6, scale=1, offset=32, halves=2),  # Q6_K
        Form("int8", 8, scale=2, offset=128),  # Q8_0, int8 made at load
        Form("int8wide", 8, scale=4, low=4, offset=128),  # anything else
    )
}
PAIRS = DenseForm("bf16pairs", 2, together=2)  # whose products take activations in bfloat16, too
DENSE_FORMS = {form.name: form for form in (DenseForm("f32", 4), DenseForm("f16", 2), DenseForm("bf16", 2), PAIRS)}
NAMES = (*BLOCK_FORMS, *DENSE_FORMS)


def form_named(name: str) -> Form | DenseForm:
    """By its name; KeyError for no form's."""
    return BLOCK_FORMS[name] if name in BLOCK_FORMS else DENSE_FORMS[name]


def panel_bytes(form: Form | DenseForm, columns: int) -> int:
    """Bytes of a panel."""
    if isinstance(form, Form):
        return columns // (BLOCK * form.group) * form.group_size
    return -(-columns // form.together) * form.group_size
