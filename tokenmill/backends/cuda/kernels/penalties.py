"""Biases and penalties on rows of scores, from the state of each slot. The order: `backends/sampling.py`.

There are two passes over a sequence's tokens, with many programs a row. `count_tokens` counts the ids in a workspace of
the scores' shape. `penalize` takes each id's count, sets it to zero and changes the score. So each id is changed once,
and the workspace is zero again without a pass over the vocabulary.
"""

import triton
import triton.language as tl

from tokenmill.backends.cuda.kernels.parameters import FREQUENCY, NUM_BIASES, NUM_PROMPT, PRESENCE, REPETITION

IN_PROMPT: tl.constexpr = tl.constexpr(1 << 30)
"""Bit of a count that is set for ids of the prompt; the bits below count the id in the output."""


@triton.jit
def place_of(pairs_ptr, rows_ptr, r):
    """Return slot and position of the token that row r samples."""
    t = tl.load(rows_ptr + r)
    return tl.load(pairs_ptr + 2 * t).to(tl.int64), tl.load(pairs_ptr + 2 * t + 1) + 1


@triton.jit
def penalties_of(at):
    """Return repetition, frequency and presence penalty of a row of parameters, and True if any has an effect."""
    repetition = tl.load(at + REPETITION).to(tl.float32, bitcast=True)
    frequency = tl.load(at + FREQUENCY).to(tl.float32, bitcast=True)
    presence = tl.load(at + PRESENCE).to(tl.float32, bitcast=True)
    return repetition, frequency, presence, (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)


@triton.jit
def first_counted(at, SKIPS: tl.constexpr):
    """Return the first token that penalties count, of a row of parameters."""
    if SKIPS:
        return tl.maximum(tl.load(at + NUM_PROMPT) - 1, 0)
    else:
        return 0


@triton.jit(do_not_specialize=["biases_stride"])  # It changes when room for biases grows.
def count_tokens(pairs_ptr, rows_ptr, parameters_ptr, biases_ptr, tokens_ptr, counts_ptr, scores_ptr, parameters_stride,
                 biases_stride, tokens_stride, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
                 SKIPS: tl.constexpr):  # fmt: skip
    """Add biases to scores[r, id]. For rows with a penalty, set counts[r, id] to the number of times the id is in the
    output, with the bit IN_PROMPT if it is in the prompt.

    counts (R, VOCAB) are zero before. Biases of a slot: (id, value, position where it ends). Only infinite ones have an
    id twice, so the order does not matter. SKIPS: of the prompt only the last token counts. Grid (R, any).
    """
    r, c = tl.program_id(0), tl.program_id(1)
    slot, position = place_of(pairs_ptr, rows_ptr, r)
    at = parameters_ptr + slot * parameters_stride
    if c == 0:
        num_biases = tl.load(at + NUM_BIASES)
        for start in range(0, num_biases, BLOCK):
            i = start + tl.arange(0, BLOCK)
            bias = biases_ptr + slot * biases_stride + 3 * i
            ids = tl.load(bias, mask=i < num_biases, other=-1)
            value = tl.load(bias + 1, mask=i < num_biases, other=0).to(tl.float32, bitcast=True)
            holds = (position < tl.load(bias + 2, mask=i < num_biases, other=0)) & (ids >= 0) & (ids < VOCAB)
            tl.atomic_add(scores_ptr + r.to(tl.int64) * VOCAB + ids, value, mask=holds, sem="relaxed")
    _, _, _, penalized = penalties_of(at)
    end = tl.where(penalized, position, 0)
    num_prompt = tl.load(at + NUM_PROMPT)
    for start in range(first_counted(at, SKIPS) + c * BLOCK, end, tl.num_programs(1) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        ids = tl.load(tokens_ptr + slot * tokens_stride + i, mask=i < end, other=-1)
        valid = (ids >= 0) & (ids < VOCAB)
        count = counts_ptr + r.to(tl.int64) * VOCAB + ids
        tl.atomic_or(count, IN_PROMPT, mask=valid & (i < num_prompt), sem="relaxed")
        tl.atomic_add(count, 1, mask=valid & (i >= num_prompt), sem="relaxed")


@triton.jit
def penalize(pairs_ptr, rows_ptr, parameters_ptr, tokens_ptr, counts_ptr, scores_ptr, parameters_stride, tokens_stride,
             VOCAB: tl.constexpr, BLOCK: tl.constexpr, SKIPS: tl.constexpr):  # fmt: skip
    """Apply the three penalties to scores (R, VOCAB) of ids that `count_tokens` counted, and set the counts to zero.

    Grid (R, any). Launch without contraction of products and sums: ties between ids stay ties.
    """
    r, c = tl.program_id(0), tl.program_id(1)
    slot, position = place_of(pairs_ptr, rows_ptr, r)
    at = parameters_ptr + slot * parameters_stride
    repetition, frequency, presence, penalized = penalties_of(at)
    end = tl.where(penalized, position, 0)
    for start in range(first_counted(at, SKIPS) + c * BLOCK, end, tl.num_programs(1) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        ids = tl.load(tokens_ptr + slot * tokens_stride + i, mask=i < end, other=-1)
        valid = (ids >= 0) & (ids < VOCAB)
        place = r.to(tl.int64) * VOCAB + ids
        count = tl.atomic_xchg(counts_ptr + place, 0, mask=valid, sem="relaxed")
        mine = valid & (count != 0)  # The program that takes the count changes the score.
        x = tl.load(scores_ptr + place, mask=mine, other=0.0)
        x = tl.where(x < 0.0, x * repetition, tl.div_rn(x, repetition))
        output = count & (IN_PROMPT - 1)
        penalty = frequency * output.to(tl.float32)
        x = tl.where(output > 0, x - penalty - presence, x)
        tl.store(scores_ptr + place, x, mask=mine)
