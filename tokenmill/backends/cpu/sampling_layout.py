"""The interface between the host's sampler and its kernel: words and scratch."""

from __future__ import annotations

from tokenmill.backends.sampling import PARAMETERS, offset

# ---- the sampler's words: offsets from their address, which is `layout.SAMPLING` of the context ----
MODE = 0  # SAMPLE or SCORE
PARAMETER_ROWS = 8  # address of `Parameters.rows`
TOKENS = 16  # address of the slots' tokens, int32
TOKENS_STRIDE = 24  # bytes
BIAS_IDS = 32  # addresses of `Parameters.bias_ids` …
BIAS_VALUES = 40
BIAS_UNTIL = 48
BIAS_STRIDE = 56  # bytes from slot to slot, of each of the three
SCRATCH = 64  # scratch of each thread, at SCRATCH + tid * SCRATCH_SIZE
SCRATCH_SIZE = 72
MAX_LISTED = 80  # maximum number of ids that a row lists; -1: no log-probabilities in this step
LISTED = 88  # int32 for each row: number of listed ids; -1: no log-probabilities
CHOSEN = 96  # float32 for each row: log-probability of its token
TOP_IDS = 104  # int32, MAX_LISTED for each row, best first
TOP_LOGPROBS = 112  # float32, MAX_LISTED for each row
TARGETS = 120  # SCORE: int64 for each row, the token whose log-probability is computed
WANTED = 128  # SCORE: int64 for each row, number of ids to list; -1: no log-probabilities
MASKS = 136  # int64 for each row: address of its logits mask, one bit for each id, or 0. MASKS 0: no row has a mask
SKIPS_INPUTS = 144  # 1: of a prompt only the last token counts in penalties, because an encoder reads the others
WORDS = 24  # words of 8 bytes

SAMPLE, SCORE = range(2)
"""Modes: sample a row's next token, or only compute the log-probability of a given one (prompts)"""

# ---- scratch of a thread: offsets of the words with the addresses of its parts; 4 bytes for each id, if not stated
WORK = 0  # a copy of the row
COUNTS = 8  # occurrences of each id; zeros between uses
TOUCHED = 16  # ids with occurrences
MAXIMA = 24  # maxima of the row's blocks
SCORES = 32  # scores of collected ids
IDS = 40  # collected ids
WEIGHTS = 48  # e^(score - best) of collected ids
KEYS = 56  # sort keys of collected ids, where these are not the scores
MEMBERS = 64  # keys in a bucket
MEMBER_WEIGHTS = 72
HISTOGRAM = 80  # BUCKETS float64
MASSES = 88  # 16 float32
DEPTHS = 96  # 8 float32
FIRST_DEPTHS = 104  # INITIAL_DEPTHS
KEPT = 112  # if kept ids are not collected: float64, their mass; float32, their least score
TWISTER = 120  # state of the Mersenne Twister (sampling_watermark.py)
PARTS = 16
TWISTER_BYTES = 2560
INITIAL_DEPTHS = (1.5, 3.0, 4.5, 6.0, 7.5, 9.0, 11.0, 14.0)
"""Depths below the best score at which the mass is measured first"""
BUCKETS = 256

# ---- a slot's parameters: offsets in a row of `Parameters.rows` ----
ROW_BYTES = PARAMETERS.itemsize
TEMPERATURE, TOP_K, TOP_P = offset("temperature"), offset("top_k"), offset("top_p")
TYPICAL_P, MIN_P = offset("typical_p"), offset("min_p")
REPETITION, FREQUENCY, PRESENCE = offset("repetition"), offset("frequency"), offset("presence")
SEED_LOW, SEED_HIGH = offset("seed_low"), offset("seed_high")
NUM_PROMPT, NUM_BIASES = offset("num_prompt"), offset("num_biases")
LOGPROBS, RAW_LOGPROBS = offset("logprobs"), offset("raw_logprobs")
WATERMARK_GAMMA, WATERMARK_DELTA = offset("watermark_gamma"), offset("watermark_delta")
