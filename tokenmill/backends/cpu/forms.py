"""Memory layouts of packed weights: panels of 16 outputs. A block form has the same layout for every instruction set.

A quantized form stores, for each 32 columns of a panel, in this order:

* unsigned codes, in planes of 64 bytes. Byte v of vector j is the code of output v // 4 and column 4 · j + v % 4.
  4 bits: four planes of nibbles; low nibbles are vectors j = 0 … 3, high nibbles j = 4 … 7.
  5 bits: the same, then a plane whose bit j is bit 4 of vector j's byte.
  6 bits: the same, then two planes, for vectors 0 … 3 and 4 … 7, with two bits for each vector.
  8 bits: eight planes, one for each vector.
* a scale for each output; two if a scale covers 16 columns;
* an addend for each output (`low`), if the form has one; two, like scales. Otherwise `offset` is subtracted from every
  code.

Dequantized weight: scale · (code − offset) + low. Two-level forms (GGUF's K types) have int8 scales and lows. There,
every group of eight blocks begins with float16 factors for each output: those of the scales, then those of the lows.
Where four blocks share a scale and a low (GPTQ, AWQ), the group begins with these, and the blocks are codes only.

Dense forms store, for each column, one number for each of the 16 outputs. Instruction sets with bfloat16 dot products
use pairs: for each two columns, two numbers for each of the 16 outputs. An odd last column is paired with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

PANEL = 16  # outputs of a panel
BLOCK = 32  # columns that share a scale of the activations


@dataclass(frozen=True, slots=True)
class Form:
    """The layout of quantized weights."""

    name: str
    bits: int  # bits of a code: 4, 5, 6 or 8
    scale: int  # bytes of a scale: 1, 2 or 4 (int8, float16, float32); 0: a group of blocks shares scale and low
    low: int = 0  # bytes of an addend: 0 (no addends), 1, 2 or 4
    offset: int = 0
    halves: int = 1  # scales and addends for each 32 columns: 1, or 2 of 16 columns each

    @property
    def codes(self) -> int:
        """Bytes of the codes of a block, which is also the offset of the scales."""
        return 64 * self.bits

    @property
    def scales(self) -> int:
        """Bytes of the scales of a block."""
        return PANEL * self.scale * self.halves

    @property
    def size(self) -> int:
        """Bytes of a block, without factors. A block is 32 columns of a panel."""
        return self.codes + self.scales + PANEL * self.low * self.halves

    @property
    def group(self) -> int:
        """The number of blocks that share factors."""
        return {0: 4, 1: 8}.get(self.scale, 1)

    @property
    def adds(self) -> bool:
        """True if there are addends."""
        return self.low > 0 or self.scale == 0

    @property
    def lows(self) -> int:
        """Offset of the addends of a block; behind that of the scales, also where the block has neither."""
        return self.codes + (self.scales or 1)

    @property
    def factors(self) -> int:
        """Bytes of the factors at the beginning of each group, or of the scales and lows that its blocks share."""
        return 2 * PANEL * (1 + self.adds) if self.group > 1 else 0

    @property
    def group_size(self) -> int:
        """Bytes of a group of blocks with its factors."""
        return self.factors + self.group * self.size


@dataclass(frozen=True, slots=True)
class DenseForm:
    """The layout of unquantized weights."""

    name: str
    item: int  # bytes of a number
    together: int = 1  # adjacent columns that an output stores side by side

    @property
    def size(self) -> int:
        """Bytes of a column of a panel."""
        return PANEL * self.item

    @property
    def group_size(self) -> int:
        """Bytes of a group of `together` columns."""
        return self.together * self.size


BLOCK_FORMS = {
    form.name: form
    for form in (
        Form("int2k", 4, scale=1, low=1, halves=2),  # Q2_K
        Form("int3k", 4, scale=1, offset=4, halves=2),  # Q3_K
        Form("int4", 4, scale=2, low=2),  # Q4_1; zero points of groups of less than 128
        Form("int4group", 4, scale=0),  # zero points of groups of 128 or a multiple (AWQ, GPTQ)
        Form("int4even", 4, scale=2, offset=8),  # Q4_0, TQ1_0, TQ2_0; GPTQ without zero points
        Form("int4wide", 4, scale=4, low=4),  # scales or zeros beyond float16
        Form("int4k", 4, scale=1, low=1),  # Q4_K
        Form("int5", 5, scale=2, low=2),  # Q5_1
        Form("int5even", 5, scale=2, offset=16),  # Q5_0
        Form("int5wide", 5, scale=4, low=4),  # MXFP4
        Form("int5k", 5, scale=1, low=1),  # Q5_K
        Form("int6k", 6, scale=1, offset=32, halves=2),  # Q6_K
        Form("int8", 8, scale=2, offset=128),  # Q8_0, IQ4_NL; int8 quantized at load
        Form("int8k", 8, scale=1, offset=128),  # IQ4_XS
        Form("int8wide", 8, scale=4, low=4, offset=128),  # every other kind of blocks
    )
}
PAIRS = DenseForm("bf16pairs", 2, together=2)  # its products take bfloat16 activations as well
DENSE_FORMS = {form.name: form for form in (DenseForm("f32", 4), DenseForm("f16", 2), DenseForm("bf16", 2), PAIRS)}
NAMES = (*BLOCK_FORMS, *DENSE_FORMS)
FLOATS = tuple(name for name in DENSE_FORMS if name != PAIRS.name)


def form_named(name: str) -> Form | DenseForm:
    """Return a form by its name. Raises KeyError for an unknown name."""
    return BLOCK_FORMS[name] if name in BLOCK_FORMS else DENSE_FORMS[name]


def panel_bytes(form: Form | DenseForm, columns: int) -> int:
    """Return the bytes of a panel."""
    if isinstance(form, Form):
        return columns // (BLOCK * form.group) * form.group_size
    return -(-columns // form.together) * form.group_size
