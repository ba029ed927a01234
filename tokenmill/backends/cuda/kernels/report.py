"""Log-probabilities of a row: the scores to find the likeliest ids in, and that of the chosen token."""

import triton
import triton.language as tl

from tokenmill.backends.cuda.kernels.filtered import scale_of
from tokenmill.backends.cuda.kernels.parameters import RAW_LOGPROBS
from tokenmill.backends.cuda.kernels.penalties import place_of
from tokenmill.backends.cuda.kernels.search import key_of


@triton.jit
def processed(source, logits, raw, scale, low, high):
    """Return the score that was sampled from, minus infinity if a filter removed it; if `raw`, the model's logit."""
    x = source.to(tl.float32)
    key = key_of(x, 0)
    x = tl.where((key >= low) & (key <= high), x * scale, float("-inf"))
    return tl.where(raw, logits.to(tl.float32), x)


@triton.jit
def report(asked_ptr, logits_ptr, source_ptr, pairs_ptr, rows_ptr, parameters_ptr, kept_ptr, chosen_ptr, scores_ptr,
           logprob_ptr, total_ptr, parameters_stride, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
           FILTERED: tl.constexpr):  # fmt: skip
    """Report rows r = asked[…]: scores[r] as `processed`, total[r]: the logarithm of the sum of e^scores, logprob[r]:
    the log-probability of chosen[r].

    source (R, VOCAB): logits, or scores with penalties, which may be `scores` itself. FILTERED: kept[r] has the bounds
    of the keys that the filters kept. Grid (rows that ask,).
    """
    r = tl.load(asked_ptr + tl.program_id(0))
    slot, _ = place_of(pairs_ptr, rows_ptr, r)
    at = parameters_ptr + slot * parameters_stride
    scale, _ = scale_of(at)
    raw = tl.load(at + RAW_LOGPROBS) != 0
    low, high = -2147483648, 2147483647
    if FILTERED:
        low, high = tl.load(kept_ptr + 2 * r), tl.load(kept_ptr + 2 * r + 1)
    begin = r.to(tl.int64) * VOCAB
    token = tl.maximum(tl.load(chosen_ptr + r), 0)
    own = processed(tl.load(source_ptr + begin + token), tl.load(logits_ptr + begin + token), raw, scale, low, high)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    tl.debug_barrier()  # `scores` may be `source`, which was just read.
    for start in range(0, VOCAB, BLOCK):
        o = start + tl.arange(0, BLOCK)
        source = tl.load(source_ptr + begin + o, mask=o < VOCAB, other=0.0)
        logits = tl.load(logits_ptr + begin + o, mask=(o < VOCAB) & raw, other=0.0)
        x = processed(source, logits, raw, scale, low, high)
        tl.store(scores_ptr + begin + o, x, mask=o < VOCAB)
        most = tl.maximum(most, tl.where(o < VOCAB, x, float("-inf")))
    best = tl.max(most, 0)
    mass = tl.zeros([BLOCK], tl.float32)
    tl.debug_barrier()  # Another thread may have written the scores read below.
    for start in range(0, VOCAB, BLOCK):
        o = start + tl.arange(0, BLOCK)
        mass += tl.exp(tl.load(scores_ptr + begin + o, mask=o < VOCAB, other=float("-inf")) - best)
    total = best + tl.log(tl.sum(mass, 0))
    tl.store(total_ptr + r, total)
    tl.store(logprob_ptr + r, own - total)
