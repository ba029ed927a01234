"""What kernels and lowering agree on: the columns of a table's row and the words of a step's context.

A step is a table of int64 words, a row an operation. Every thread walks it (`step.py`) and calls the kernel whose
address is the row's first word:

    kernel(tid, row, context, counter) -> int64

with addresses as int64. `counter` is the row's own int64 in a cache line of its own, zero at the step's beginning:
threads take items from it with an atomic add. A kernel returns 0 if a barrier must follow, 1 if every thread did all
of the work for itself (or there was none) and nothing must wait.

Values are matrices, float32 or int8, rows at multiples of a stride in bytes, 64-byte aligned. float32 rows are padded
to whole vectors of 16. int8 rows have scales: two float32 (s, s times the sum of codes) for each 32 columns, so a row
of scales is `stride of x / 4` bytes, in the same order. Float fields travel as the bits of a float32 in a word's low
half (`float_bits`).
"""

from __future__ import annotations

import numpy as np

# ---- columns of a row: those of every kind ----
KERNEL = 0  # the kernel's address
ROWS = 1  # how many rows: 0 the step's tokens, 1 its rows that sample
X = 2  # input
X_STRIDE = 3  # bytes from row to row
X_SCALES = 4  # 0: x is float32
OUT = 5  # output
OUT_STRIDE = 6
OUT_SCALES = 7  # 0: out is float32
WIDTH = 8  # columns of x, unless the kernel says otherwise
PRIVATE_X = 9  # 1: with at most FEW rows, each thread has a copy of x of its own (see `own`)
PRIVATE_OUT = 10  # 1: with at most FEW rows, each thread writes a copy of its own, all rows of it
# from here on each kind has its own
# Linear, plain and gated (gated: out is half as wide; panels come as 2 of gate, 2 of up)
WEIGHT = 11  # address of the panels
PANEL_BYTES = 12
PANELS = 13  # of 16 outputs
RESIDUAL = 14  # 0: none; added to the product
RESIDUAL_STRIDE = 15
BIAS = 16  # 0: none; float32, padded
ACT = 17  # one of the numbers below
GATED = 18  # 1: act(gate) · up
# Embed
TABLE = 11  # address of the panels
TABLE_PANEL_BYTES = 12
TABLE_SCALE = 13  # bits of a float; 0: none
BY_POSITION = 14  # 1: rows are looked up by position instead of id
# Norm (WIDTH: columns of a row, or of a head with HEADS of them)
NORM_WEIGHT = 11
NORM_BIAS = 12  # 0: none
NORM_EPS = 13
CENTER = 14  # 1: LayerNorm
HEADS = 15  # 0: of the whole row; else of each of so many heads
Y = 18  # AddNorm, Add: the other term
Y_STRIDE = 19
TOTAL = 20  # AddNorm: the sum
TOTAL_STRIDE = 21
# Attention (X: queries; WIDTH: kv heads)
HEAD_DIM = 11
GROUP = 12  # query heads of a kv head
CACHE = 13  # the layer's part of block 0
KEYS = 14
VALUES = 15
ROPE = 16  # 0: none; the step's turns: a row each token, cosines, then sines, each padded to whole vectors, float32
ROPE_HALF = 17  # half of the rotary columns
ROPE_STRIDE = 18  # bytes from row to row (`rope.turns_stride`)
ATTENTION_SCALE = 19
ATTENTION_CAP = 20  # 0: none
WINDOW = 21  # 0: none
HEAD_EPS = 22
Q_NORM = 23  # 0: none
K_NORM = 24
ITEM_ROWS = 25  # query rows of an item, at most
PAGE_STRIDE = 26  # bytes from a head's page of a block to the one of the next block
KEY_STRIDE = 27  # bytes from row to row of KEYS
VALUE_STRIDE = 28
# Turns: a step's cosines and sines, one row of the table before Embed for each RopeTable (OUT, OUT_STRIDE: the turns)
FREQUENCIES = 11  # float32, padded to whole vectors: `rope.frequencies`
FREQUENCY_STRIDE = 12  # bytes from position to position; 0: the same at all (all scalings but dynamic)
MAGNITUDE = 13  # bits of a float
# ROPE_HALF as of attention
# Rope by itself (X may be OUT): ROPE, ROPE_HALF, ROPE_STRIDE, HEAD_DIM as of attention; HEADS
# Act, GatedAct (X gate, Y up): ACT
CAP = 11  # SoftCap
# Sample (X: logits, which it owns; WIDTH: the vocabulary, without padding; ROWS 1): no columns of its own
COLUMNS = 32
ROW_BYTES = COLUMNS * 8

# ---- words of the context ----
THREADS = 0  # threads that walk the table
TOKEN_IDS = 3  # the ids known so far: int32, a row a slot
TOKEN_IDS_STRIDE = 4  # bytes
BARRIER = 5  # address of the barrier's int64
COUNTERS = 6  # address of the rows' counters, 64 bytes each
TABLES = 7  # block tables: int32, a row a slot
TABLE_STRIDE = 8  # bytes
TILE = 9  # scratch of each thread: TILE + tid * TILE_SIZE
TILE_SIZE = 10
SCORES = 11  # attention's scores: SCORES + (tid * SCORE_ROWS + row) * SCORES_SIZE
SCORES_SIZE = 12  # bytes of one row of scores
ROW = 13  # scratch of each thread for one row: ROW + tid * ROW_SIZE
ROW_SIZE = 14
ZEROS = 15  # 4,096 bytes of zeros
NARROW = 16  # a product's activations in bfloat16: rows of `narrow_stride`; 0 in programs that have none
NARROW_SIZE = 17  # with at most FEW rows, each thread has its own: NARROW + tid * NARROW_SIZE
SAMPLING = 25  # address of the sampler's own words (sampling.py: Sampler.address); set once
FIRST_ROW = 26  # address of the first row of the table to walk
LAST_ROW = 27  # and the one behind the last
BARRIER_BASE = 28  # what the barrier's int64 was when the step began: it is never set back
GENERATION = 29  # steps begun so far; workers look at it
STOP = 30  # 1: workers leave
WAIT = 31  # address of a function (semaphore, unused) that sleeps until the semaphore is posted
YIELD = 32  # address of a function () that offers the core to others
# from here on words of one step, which are written in one go (`backend.StepPlan`)
TOKENS = 40  # rows of values of tokens
SAMPLES = 41  # rows of values of rows that sample
ITEMS = 42  # of attention: runs of consecutive rows of one sequence
SINGLE_TOKEN = 43  # 1: no row sees another's key of this step (every sequence has one row)
POSITIONS = 44  # int64 a token: position in its sequence
SEQUENCES = 45  # int64 a token: its slot, which is the row of TABLES and KNOWN
SAMPLED = 46  # int64 a sampling row: its place among the tokens
FIRST = 47  # int64 an item of attention: its first row
COUNT = 48  # int64 an item: its rows
RESULT = 49  # int64 a sampling row: the id that was chosen
SAMPLED_SLOTS = 50  # int64 a sampling row: its slot
SAMPLED_POSITIONS = 51  # int64 a sampling row: position of the token that is being sampled
STEP_WORDS = slice(TOKENS, SAMPLED_POSITIONS + 1)
CONTEXT = 64

FEW = 4  # up to so many rows every thread computes norms for itself: cheaper than a barrier
SCORE_ROWS = 8  # (query row, head) pairs that attention handles at once, at most
BLOCK = 16  # tokens of a cache page: one vector
NO_ACT, SILU, GELU_TANH, GELU_ERF, RELU = range(5)  # activations
ACTS: dict[str | None, int] = {
    None: NO_ACT,
    "silu": SILU,
    "gelu": GELU_ERF,
    "gelu_new": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "relu": RELU,
}
"""Numbers of activations by transformers' names."""


def narrow_stride(columns: int) -> int:
    """Bytes of a row of bfloat16, with room for a zero behind it. An odd number of cache lines for most widths: rows
    a power of two apart would push each other out of the cache.
    """
    return (columns // 32 + 1) * 64


def float_bits(x: float) -> int:
    """How a float travels in a word."""
    return int(np.float32(x).view(np.uint32))
