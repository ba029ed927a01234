"""Logits masks on rows of scores. The order: `backends/sampling.py`."""

import triton
import triton.language as tl


@triton.jit
def forbid(scores_ptr, rows_ptr, bits_ptr, VOCAB: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Set scores (R, VOCAB) float32 of row rows[m] to minus infinity where bit id % 32 of bits[m, id // 32] is 0.
    Infinity and NaN stay, so that the row is still found not to be finite.

    bits (M, WORDS) int32. Grid (M, VOCAB / BLOCK).
    """
    m = tl.program_id(0)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = scores_ptr + tl.load(rows_ptr + m).to(tl.int64) * VOCAB
    bits = tl.load(bits_ptr + m * WORDS + o // 32, mask=o < VOCAB, other=-1)
    forbidden = ((bits >> (o % 32)) & 1) == 0
    x = tl.load(row + o, mask=forbidden, other=0.0)
    tl.store(row + o, float("-inf"), mask=forbidden & (x < float("inf")))
