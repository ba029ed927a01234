"""The interface between kernels and lowering: columns of the step table and words of the step context.

A step is a table of int64 words with a row for each operation. Every thread walks the table (`step.py`) and calls the
kernel whose address is the first word of the row:

    kernel(tid, row, context, counter) -> int64

Addresses are int64. `counter` is an int64 for each row, in a cache line of its own and 0 at the start of a step:
threads take work items from it with an atomic add. A kernel returns 0 if a barrier must follow. It returns 1 if no
barrier is needed, because every thread did all the work for its private copy or there was no work.

Values are float32 or int8 matrices with 64-byte aligned rows at multiples of a stride in bytes. float32 rows are padded
to a multiple of 16 columns. int8 rows have scales: two float32 (s, s times the sum of codes) for each 32 columns, so a
row of scales has `stride of x / 4` bytes. Float fields are stored as the bits of a float32 in the low half of a word
(`float_bits`).
"""

from __future__ import annotations

import numpy as np

# ---- columns of a row that all kinds share ----
KERNEL = 0  # the kernel's address
ROWS = 1  # rows to process: 0 the tokens of the step, 1 its sampling rows
X = 2  # input
X_STRIDE = 3  # bytes from row to row
X_SCALES = 4  # 0: x is float32
OUT = 5  # output
OUT_STRIDE = 6
OUT_SCALES = 7  # 0: out is float32
WIDTH = 8  # columns of x, unless the kernel says otherwise
PRIVATE_X = 9  # not 0: with at most FEW rows, each thread has a private copy of x (`products.private_copy`)
PRIVATE_OUT = 10  # not 0: with at most FEW rows, each thread writes all rows of a private copy: thread 0 the copy of
# this number, from 1 on
# The columns from here on depend on the kind.
# Linear, plain and gated (gated: out is half as wide; 2 panels of gate alternate with 2 of up)
WEIGHT = 11  # address of the panels
PANEL_BYTES = 12
PANELS = 13  # of 16 outputs
RESIDUAL = 14  # 0: none; otherwise added to the product
RESIDUAL_STRIDE = 15
BIAS = 16  # 0: none; float32, padded
ACT = 17  # an activation, numbered below
GATED = 18  # 1: act(gate) · up
# Embed
TABLE = 11  # address of the panels
TABLE_PANEL_BYTES = 12
TABLE_SCALE = 13  # bits of a float; 0: none
BY_POSITION = 14  # 1: rows are looked up by position instead of token id
ROWS_WITHIN = 15  # ids that are not less count as 0; 0: there are none
FIRST_ID = 16  # id of the table's first row
TABLE_ROWS = 17  # rows of the table, ids of no row give zeros; 0: every id has one
# QuantizeOrdered
ORDER = 11  # int64 for each column: the column of x that it quantizes
# Norm (WIDTH: columns of a row, or of a head if HEADS is not 0)
NORM_WEIGHT = 11
NORM_BIAS = 12  # 0: none
NORM_EPS = 13
CENTER = 14  # 1: LayerNorm
HEADS = 15  # 0: one norm over the row; otherwise the number of heads, each with its own norm
Y = 18  # AddNorm, Add: the other term
Y_STRIDE = 19
TOTAL = 20  # AddNorm: the sum
TOTAL_STRIDE = 21
NORM_STEP = 22  # bytes from a head's weight and bias to those of the next one; 0: all heads share them
# Attention (X: queries; WIDTH: kv heads)
HEAD_DIM = 11
SINKS = 12  # float32 for each query head; 0: none
CACHE = 13  # the layer's part of block 0
KEYS = 14
VALUES = 15
ROPE = 16  # 0: none; cosines and sines: for each token a row of cosines, then sines, each padded to 16, float32
ROPE_HALF = 17  # half of the rotary columns
ROPE_STRIDE = 18  # bytes from row to row (`rope.cos_sin_stride`)
ATTENTION_SCALE = 19
ATTENTION_CAP = 20  # 0: none
WINDOW = 21  # 0: none
HEAD_EPS = 22
Q_NORM = 23  # 0: none
K_NORM = 24
CHUNK = 25  # positions of a chunk, within which rows attend; 0: none
PAGE_STRIDE = 26  # bytes from a page to the same head's page of the next block
KEY_STRIDE = 27  # bytes from row to row of KEYS
VALUE_STRIDE = 28
SLOPES = 29  # of ALiBi: float32 for each query head; 0: none
ROPE_INTERLEAVED = 30  # 1: pairs are adjacent columns
TABLE_AT = 31  # bytes from the beginning of a slot's tables to the layer's
# Attention of an encoder or decoder: as above, but for:
BIAS_STRIDE = 11  # bytes from the biases of a head to those of the next one
BIASES = 29  # float32 for each distance of a key from a query, for each head: the address of that for distance 0
# CosSin: one row of the table before Embed for each RopeTable (OUT, OUT_STRIDE: the cosines and sines)
FREQUENCIES = 11  # float32, padded to a multiple of 16 (`rope.frequencies`)
FREQUENCY_STRIDE = 12  # bytes from position to position; 0: independent of it (all scalings but dynamic)
MAGNITUDE = 13  # bits of a float
# ROPE_HALF: as for attention
# Rope (X may be OUT): ROPE, ROPE_HALF, ROPE_STRIDE, ROPE_INTERLEAVED, HEAD_DIM: as for attention; HEADS
# Act, GatedAct (X gate, Y up): ACT
FACTOR = 11  # Scale, SoftCap, Clip, Sparsify, WithMagnitude: bits of a float. XIelu: two, that above 0 in the low half
POSITION_FACTORS = 11  # ScaleByPosition: float32 for each LENGTH positions
LENGTH = 12
POSITION_OFFSET = 13  # added to positions
STREAMS = 12  # parts of a row, of WIDTH columns. FACTORS, FACTORS_STRIDE, Y, Y_STRIDE: as for others
# Experts. WEIGHT and BIAS: addresses of arrays with an address for each expert; PANEL_BYTES, PANELS, ACT, GATED: as for
# products. An item is a (row, expert) pair; items are sorted by expert.
EXPERTS = 11  # number of experts
TOP_K = 12  # experts of a row
SCORE = 13  # 0: scores are a softmax; 1: sigmoids; 2: those of sparsemixer
CORRECTION = 14  # 0: none; added to the scores for the choice
GROUPS = 15
TOP_GROUPS = 16
GROUP_BEST = 17  # best scores that make a group's, 1 or 2
RENORMALIZE = 18
LEAST_SUM = 19  # bits of a float
FACTOR_SCALE = 20  # bits of a float
FACTORS = 21  # float32 for each expert of a row
FACTORS_STRIDE = 22  # bytes from row to row
COUNTS = 23  # int64 for each expert, scratch; then the number of items
ACTIVE = 24  # experts with items (`experts._sort`)
SOURCE = 25  # int64 for each item: row · TOP_K + index of the expert; 0: the input has a row for each item
PLACE = 26  # int64 for each (row, expert): its item; -1: another rank has the expert
FIRST_EXPERT = 19  # id of the first expert that this rank has
MARGIN = 27  # bits of a float: of sparsemixer, twice
LIMIT = 27  # bits of a float, the largest magnitude of gate and up; 0: none
UP_OFFSET = 28  # bits of a float, added to up
# Product of each head with a matrix of its own: WEIGHT, PANEL_BYTES, PANELS, BIAS, ACT as for products. WIDTH: columns
# of a head's x
HEAD_PANELS = 19  # of a head's matrix
X_STEP = 20  # bytes from a head's x to that of the next one
OUT_STEP = 21
# Latent (X: queries; OUT: those that attend; KEYS, VALUES: key and latent of a row; WIDTH: heads); ROPE, ROPE_HALF,
# ROPE_STRIDE, KEY_STRIDE, VALUE_STRIDE, ROPE_INTERLEAVED: as for attention
HEAD_BYTES = 11  # of a query
ROTATED_BYTES = 12  # of its columns that are rotated, which come last
OUT_HEAD_BYTES = 13
LATENT = 20  # rows of the cache: the latent, then the rotated key
LATENT_STRIDE = 21
# Operations with a state for each slot
STATE = 11  # address of the first slot's ring
STATE_SLOT = 12  # bytes from slot to slot
STATE_BYTES = 13  # of one of a slot's states
# CausalConv; WIDTH: columns. A state: the last inputs, (TAPS − 1, columns padded to 16)
TAPS = 14
TAP_WEIGHTS = 15  # float32 (TAPS, columns padded to 16)
# BIAS = 16: 0: none; ACT = 17
# StateSpace; WIDTH: columns. A state: (columns / 16, STATE_COLUMNS, 16)
DT = 14
DT_STRIDE = 15
DT_BIAS = 16  # 0: none
B = 17
B_STRIDE = 18
C = 19
C_STRIDE = 20
DECAY = 21  # −e^a_log: float32 for each head, or (heads / 16, STATE_COLUMNS, 16)
SKIP = 22  # float32 for each column, times x, added to the result
DECAY_BY_COLUMN = 23  # 1: DECAY has a number for each column of the state
HEAD_COLUMNS = 24  # columns of x that share a step
GROUP_COLUMNS = 25  # columns of x that share b and c
STATE_COLUMNS = 26  # numbers of a column's state
LOW = 27  # bits of a float: limits of a step
HIGH = 28
# DeltaRule (X: queries). A state: (heads, columns of a value / 16, columns of a key, 16)
# DT, DT_STRIDE, DT_BIAS: those of the decay; DECAY as above
K = 17
K_STRIDE = 18
V = 19
V_STRIDE = 20
KEY_HEADS = 22  # heads of X and K
VALUE_HEADS = 23
VALUE_COLUMNS = 24  # columns of a value's head
DT_COLUMNS = 25  # columns of DT for each head of values: 1, or STATE_COLUMNS
# STATE_COLUMNS = 26: columns of a key's head
RATE = 27  # bits of a float
RATES = 28
RATES_STRIDE = 29
QUERY_FACTOR = 30  # bits of a float, times queries of length 1
# RgLru. A state: the last results
INPUT_GATES = 17
GATES_STRIDE = 18
RECURRENCE_GATES = 19
# DECAY: −8 · softplus(a)
# SumRanks. X: of rank 0. Y, Y_STRIDE: the residual; 0: none
SLOT_BYTES = 11  # from a rank's x to that of the next one
# Gather. X: of rank 0; SLOT_BYTES; WIDTH: columns of a rank
GATHERED = 12  # columns of out
# Moments: FACTOR
# NormOfShare, Sparsify with moments: NORM_WEIGHT, NORM_EPS or FACTOR; Y, Y_STRIDE: the moments
SHARED_COLUMNS = 20  # columns of the row over all ranks
# Rows of a rank, in kernels that compute row by row
OWN_FIRST = 30  # added to the number of a thread: the first row that it computes
OWN_STEP = 31  # from a row of a thread to its next one; 0, or at most FEW rows: THREADS, and all rows are computed
# Meet. ROWS
ALWAYS = 11  # 0: ranks meet only if there are more than FEW rows
# Sample (X: logits, which it overwrites; WIDTH: vocabulary size, without padding; ROWS: 1): no other columns
COLUMNS = 32
ROW_BYTES = COLUMNS * 8

# ---- words of the context ----
THREADS = 0  # threads that walk the table
TOKEN_IDS = 3  # address of the token ids so far: int32, a row for each slot
TOKEN_IDS_STRIDE = 4  # bytes
BARRIER = 5  # address of the barrier's int64
COUNTERS = 6  # address of the rows' counters, 64 bytes each
TABLES = 7  # address of the block tables: int32, a row for each slot, with all its tables side by side
TABLE_STRIDE = 8  # bytes
TILE = 9  # scratch of each thread, at TILE + tid * TILE_SIZE
TILE_SIZE = 10
SCORES = 11  # attention scores, at SCORES + (tid * SCORE_ROWS + row) * SCORES_SIZE
SCORES_SIZE = 12  # bytes of one row of scores
ROW = 13  # scratch of each thread for one row, at ROW + tid * ROW_SIZE
ROW_SIZE = 14
ZEROS = 15  # 4,096 bytes of zeros
NARROW = 16  # activations of a product in bfloat16: rows of `narrow_stride` bytes; 0: not used
NARROW_SIZE = 17  # with at most FEW rows, each thread has a private copy at NARROW + tid * NARROW_SIZE
NUM_PROMPT = 18  # address of the tokens of each slot's prompt: int32, the encoder's input and a first token behind it
NUM_PROMPT_STRIDE = 19  # bytes
RANK = 20
RANKS = 21  # 0 for one rank
RANK_LINES = 22  # address of the ranks' lines in shared memory (LINE bytes each): meetings reached, process id
MEETINGS = 23  # address of the meetings that each thread has reached, 64 bytes each
PATIENCE = 24  # naps after which a rank is given up; 0: never
SAMPLING = 25  # address of the sampler's words (`sampler.Sampler.address`); set once
FIRST_ROW = 26  # address of the first row of the table to walk
LAST_ROW = 27  # address behind the last row to walk
BARRIER_BASE = 28  # value of the barrier's int64 at the start of the step; it only grows
GENERATION = 29  # steps begun so far; workers poll it
STOP = 30  # 1: workers exit
WAIT = 31  # address of a function (semaphore, unused) that waits for the semaphore
YIELD = 32  # address of a function () that yields the core
NAP = 33  # address of a function (microseconds) that sleeps
PROBE = 34  # address of a function (process id, 0) that returns 0 if there is such a process
LOST = 35  # 0, or 1 + the rank that another waited for in vain; negative: it exists, but did not arrive in time
# The words from here on change every step and are written together (`backend.StepPlan`).
TOKENS = 40  # number of tokens
SAMPLES = 41  # number of sampling rows
ITEMS = 42  # number of attention items: runs of consecutive rows of one sequence
SINGLE_TOKEN = 43  # 1: every sequence has one token, so no row attends to another key of this step
POSITIONS = 44  # int64 for each token: its position in the sequence
SEQUENCES = 45  # int64 for each token: its slot, which is its row of TABLES and TOKEN_IDS
SAMPLED = 46  # int64 for each sampling row: its index among the tokens
FIRST = 47  # int64 for each attention item: its first row
COUNT = 48  # int64 for each attention item: its number of rows
RESULT = 49  # int64 for each sampling row: the sampled token id
SAMPLED_SLOTS = 50  # int64 for each sampling row: its slot
SAMPLED_POSITIONS = 51  # int64 for each sampling row: position of the sampled token
RUNS = 52  # number of sequences
RUN_FIRST = 53  # int64 for each sequence: its first row; then the number of rows
STEP_WORDS = slice(TOKENS, RUN_FIRST + 1)
CONTEXT = 64

FEW = 4  # up to this many rows, each thread computes norms into a private copy: cheaper than a barrier
SCORE_ROWS = 8  # maximum (query row, head) pairs of an attention tile
LINE = 128  # bytes from a rank's line to the next one: two cache lines, because processors fetch pairs
STATE_RING = 2  # states of a slot (`backends.steps.STATE_RING`)
BLOCK = 16  # tokens of a cache page: the elements of one vector
NO_ACT, SILU, GELU_TANH, GELU_ERF, RELU, RELU2, QUICK_GELU, SIGMOID, LINEAR = range(9)  # activations
SCORES_OF_EXPERTS = ("softmax", "sigmoid", "sparsemixer")
"""`ops.Route.score` by SCORE"""
ACTS: dict[str | None, int] = {
    None: NO_ACT,
    "silu": SILU,
    "gelu": GELU_ERF,
    "gelu_new": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "relu": RELU,
    "relu2": RELU2,
    "quick_gelu": QUICK_GELU,
    "sigmoid": SIGMOID,
    "linear": LINEAR,
}
"""Activation numbers by transformers' names"""


Fields = dict[int, int]
"""A word by column of the table"""
Lowered = list[tuple[str, Fields]]
"""Kernels in the order of execution, each with the columns of its kind"""


def narrow_stride(columns: int) -> int:
    """Return the bytes of a row of `columns` bfloat16 and a trailing zero.

    For most widths this is an odd number of cache lines: rows at a power of two would evict each other from the cache.
    """
    return (columns // 32 + 1) * 64


def float_bits(x: float) -> int:
    """Return the bits of a float32, as a word of a row or of the context."""
    return int(np.float32(x).view(np.uint32))
