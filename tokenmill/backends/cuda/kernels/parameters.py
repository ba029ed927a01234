"""Columns of a slot's sampling parameters, `backends.sampling.PARAMETERS`, as constants of Triton's kernels."""

import triton.language as tl

from tokenmill.backends import sampling

TEMPERATURE: tl.constexpr = tl.constexpr(sampling.column("temperature"))
SEED_LOW: tl.constexpr = tl.constexpr(sampling.column("seed_low"))
SEED_HIGH: tl.constexpr = tl.constexpr(sampling.column("seed_high"))
TOP_K: tl.constexpr = tl.constexpr(sampling.column("top_k"))
TOP_P: tl.constexpr = tl.constexpr(sampling.column("top_p"))
MIN_P: tl.constexpr = tl.constexpr(sampling.column("min_p"))
TYPICAL_P: tl.constexpr = tl.constexpr(sampling.column("typical_p"))
REPETITION: tl.constexpr = tl.constexpr(sampling.column("repetition"))
FREQUENCY: tl.constexpr = tl.constexpr(sampling.column("frequency"))
PRESENCE: tl.constexpr = tl.constexpr(sampling.column("presence"))
NUM_PROMPT: tl.constexpr = tl.constexpr(sampling.column("num_prompt"))
NUM_BIASES: tl.constexpr = tl.constexpr(sampling.column("num_biases"))
RAW_LOGPROBS: tl.constexpr = tl.constexpr(sampling.column("raw_logprobs"))
LEAST_TEMPERATURE: tl.constexpr = tl.constexpr(sampling.LEAST_TEMPERATURE)
