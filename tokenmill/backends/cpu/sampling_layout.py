"""What the sampler on the host and its kernels agree on: words and scratch."""

from __future__ import annotations

from tokenmill.backends.sampling import PARAMETERS

# ---- the sampler's words: offsets from their address, which is `layout.SAMPLING` of the context ----
MODE = 0  # SAMPLE or SCORE
PARAMETER_ROWS = 8  # address of `Parameters.rows`
TOKENS = 16  # address of the slots' tokens, int32
TOKENS_STRIDE = 24  # bytes
BIAS_IDS = 32  # addresses of `Parameters.bias_ids` …
BIAS_VALUES = 40
BIAS_UNTIL = 48
BIAS_STRIDE = 56  # bytes from slot to slot, of each of the three
SCRATCH = 64  # of each thread: SCRATCH + tid * SCRATCH_SIZE
SCRATCH_SIZE = 72
MAX_LISTED = 80  # the most of the likeliest ids that a row lists; -1: no log-probabilities in this step
LISTED = 88  # int32 a row: how many it lists; -1: no log-probabilities
CHOSEN = 96  # float32 a row: log-probability of its token
TOP_IDS = 104  # int32, MOST a row, best first
TOP_LOGPROBS = 112  # float32, MOST a row
TARGETS = 120  # SCORE: int64 a row, the token whose log-probability is wanted
WANTED = 128  # SCORE: int64 a row, how many it lists at most; -1: nothing
MASKS = 136  # int64 a row: address of its mask, a bit an id; 0: it may choose any. 0: no row has one
WORDS = 24  # of 8 bytes

SAMPLE, SCORE = range(2)
"""Modes: choose a row's next token; or only say how likely a given one is (prompts)."""

# ---- scratch of a thread: offsets of the words that say where its parts are; float32 or int32 an id of the vocabulary
WORK = 0  # a copy of the row
COUNTS = 8  # zeros: how often an id was seen
TOUCHED = 16  # ids that were seen
MAXIMA = 24  # of blocks of the row
SCORES = 32  # of the ids that were collected
IDS = 40  # these ids
WEIGHTS = 48  # e^(score - best)
KEYS = 56  # what they are sorted by, if not by score
MEMBERS = 64  # keys of a bucket
MEMBER_WEIGHTS = 72
HISTOGRAM = 80  # BUCKETS float64
MASSES = 88  # 16 float32
DEPTHS = 96  # 8 float32
FIRST_DEPTHS = 104  # the same, as below
KEPT = 112  # when the ids that are left are not collected: float64, their mass; float32, their least score
TWISTER = 120  # the state of a random generator (sampling_watermark.py)
PARTS = 16
TWISTER_BYTES = 2560
INITIAL_DEPTHS = (1.5, 3.0, 4.5, 6.0, 7.5, 9.0, 11.0, 14.0)
"""How far below the best score the mass is measured first."""
BUCKETS = 256

# ---- a slot's parameters: offsets in a row of `Parameters.rows` ----


def _offset(name: str) -> int:
    return next(int(field[1]) for known, field in (PARAMETERS.fields or {}).items() if known == name)


ROW_BYTES = PARAMETERS.itemsize
TEMPERATURE, TOP_K, TOP_P = _offset("temperature"), _offset("top_k"), _offset("top_p")
TYPICAL_P, MIN_P = _offset("typical_p"), _offset("min_p")
REPETITION, FREQUENCY, PRESENCE = _offset("repetition"), _offset("frequency"), _offset("presence")
SEED_LOW, SEED_HIGH = _offset("seed_low"), _offset("seed_high")
NUM_PROMPT, NUM_BIASES = _offset("num_prompt"), _offset("num_biases")
LOGPROBS, RAW_LOGPROBS = _offset("logprobs"), _offset("raw_logprobs")
WATERMARK_GAMMA, WATERMARK_DELTA = _offset("watermark_gamma"), _offset("watermark_delta")
