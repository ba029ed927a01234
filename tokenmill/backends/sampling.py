"""What sampling means, for every backend: parameters by slot, the order of the steps, and where randomness comes from.

The order, for one row of logits:

0. of ids that a mask (`backends.base.Masks`) does not allow, the logit becomes minus infinity: what is banned stays so,
   and log-probabilities that are not raw are those of what is left. A row of which nothing is left, here or below,
   gives -1, as one whose logits are not finite does;
   with a watermark, `watermark_delta` is added to the green ids (`green_ids`), a share `watermark_gamma` of all;
1. `logit_bias` is added;
2. repetition penalty r, CTRL's rule, once for each id in prompt or output: a negative logit times r, others over r;
3. frequency penalty times the id's count in the output, presence penalty once if it is there at all: subtracted;
4. stop ids are banned while fewer than `min_new_tokens` were generated;
5. temperature divides (at least 1e-6); at 0 the likeliest is taken and nothing below applies;
6. min_p keeps what is at least min_p times as likely as the likeliest;
7. top_k keeps the k likeliest, and what ties with the last of them;
8. top_p keeps an id if all that are likelier make up less than top_p together, of what is left;
9. typical_p keeps an id if all that are more typical (log-probability nearer to minus the entropy) make up less than
   typical_p together, of what is left;
10. the largest of score + noise is chosen (Gumbel's way to sample from the softmax of the scores).

Noise is a function of (seed, position, id), where the position is the chosen token's index in the sequence: the same
seed gives the same tokens in any batch, on any rank, and after a preemption:

    key   = mix(seed_low ^ mix(seed_high ^ mix(position)))         all 32 bits, unsigned, wrapping
    bits  = mix(id * 0x9E3779B9 + key) & 0x7FFFFFFF                31 bits
    u     = min((bits + 0.5) / 2**31, 1 - 2**-24)                  so noise lies in [-2.82, 22.2]
    noise = -log(-log1p(-u))

`mix` is Chris Wellons' lowbias32 (https://github.com/skeeto/hash-prospector, public domain).

The watermark is that of Kirchenbauer et al., "A Watermark for Large Language Models" (arXiv:2301.10226), with their
seeding `simple_1` and hash key: their detector, on a CPU, finds it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenmill.wire.messages import Request, SamplingParams

PARAMETERS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("typical_p", np.float32),
        ("min_p", np.float32),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("seed_low", np.uint32),
        ("seed_high", np.uint32),
        ("num_prompt", np.int32),
        ("num_biases", np.int32),
        ("logprobs", np.int32),
        ("raw_logprobs", np.bool_),
        ("prompt_logprobs", np.int32),
        ("watermark_gamma", np.float64),
        ("watermark_delta", np.float32),
    ]
)
"""One row a slot. `num_biases`: entries in use of the slot's row of `Biases`."""

WATERMARK_KEY = 15_485_863
"""Times the id of the token before: the seed of the green ids."""

MOST_TIES = 16
"""Of the likeliest ids that a row lists, so many more than it wants at most, if they are as likely as the last of them
and log-probabilities are not the raw ones."""

FOREVER = np.iinfo(np.int32).max
_GOLDEN = np.uint32(0x9E3779B9)
_Bits = NDArray[np.uint32]


class Parameters:
    """The sampling parameters of all slots, on the host; a step's rows are `rows[slots]`.

    Biases are sparse: to the logit of `bias_ids[slot, i]`, `bias_values[slot, i]` is added while the position is below
    `bias_until[slot, i]`. A banned stop id is a bias of minus infinity that ends. Entries beyond `num_biases` are
    (id 0, value 0), which changes nothing, so whole rows may be added.
    """

    def __init__(self, num_slots: int) -> None:
        self.rows = np.zeros(num_slots, PARAMETERS)
        self.bias_ids = np.zeros((num_slots, 0), np.int32)
        self.bias_values = np.zeros((num_slots, 0), np.float32)
        self.bias_until = np.zeros((num_slots, 0), np.int32)

    def admit(self, slot: int, request: Request) -> None:
        """Write a slot's row anew."""
        p = request.sampling
        seed, num_prompt = p.seed % 2**64, len(request.prompt_ids)
        biases = self._biases(request)
        self.rows[slot] = (
            p.temperature,
            p.top_k,
            p.top_p,
            p.typical_p,
            p.min_p,
            p.repetition_penalty,
            p.frequency_penalty,
            p.presence_penalty,
            seed % 2**32,
            seed >> 32,
            num_prompt,
            len(biases),
            p.logprobs,
            p.raw_logprobs,
            p.prompt_logprobs,
            p.watermark_gamma,
            p.watermark_delta,
        )
        self._widen(len(biases))
        self.bias_ids[slot], self.bias_values[slot], self.bias_until[slot] = 0, 0, 0
        for i, (token_id, value, until) in enumerate(biases):
            self.bias_ids[slot, i], self.bias_values[slot, i], self.bias_until[slot, i] = token_id, value, until

    def _biases(self, request: Request) -> list[tuple[int, float, int]]:
        """(id, value, position where it ends)."""
        biases = [(token_id, value, FOREVER) for token_id, value in request.sampling.logit_bias]
        if request.stopping.min_new_tokens > 0:
            until = len(request.prompt_ids) + request.stopping.min_new_tokens
            biases += [(token_id, -np.inf, until) for token_id in request.stopping.stop_ids]
        return biases

    def _widen(self, width: int) -> None:
        """Room for `width` biases a slot; doubled, so that it is rare."""
        missing = width - self.bias_ids.shape[1]
        if missing > 0:
            add = ((0, 0), (0, max(missing, self.bias_ids.shape[1])))
            self.bias_ids = np.pad(self.bias_ids, add)
            self.bias_values = np.pad(self.bias_values, add)
            self.bias_until = np.pad(self.bias_until, add)


def needs_full(sampling: SamplingParams, min_new_tokens: int) -> bool:
    """True if a request's rows need more than the model's logits over a temperature."""
    filtered = not sampling.greedy and (
        sampling.top_k > 0 or sampling.top_p < 1 or sampling.typical_p < 1 or sampling.min_p > 0
    )
    penalized = sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    biased = bool(sampling.logit_bias) or sampling.watermark_gamma > 0
    return filtered or penalized or biased or min_new_tokens > 0


def green_ids(previous_id: int, gamma: float, vocab_size: int) -> NDArray[np.int64]:
    """The ids that a watermark favours behind a token: the first of a random permutation of all.

    That is torch's `randperm` on a CPU: Mersenne twister, then Fisher and Yates. The definition: a backend's own is
    equal, and faster.
    """
    draw = np.random.RandomState(WATERMARK_KEY * previous_id % 2**32)
    count, ids = int(vocab_size * gamma), np.arange(vocab_size)
    bits = draw.randint(0, 2**32, min(count, vocab_size - 1), np.uint32)
    for i, other in enumerate((i + bits % (vocab_size - i) for i, bits in enumerate(bits.tolist()))):
        ids[i], ids[other] = ids[other], ids[i]
    return ids[:count]


def mix(x: _Bits) -> _Bits:
    """lowbias32: a bijection of 32-bit integers that looks random."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def noise_keys(seed_low: _Bits, seed_high: _Bits, positions: NDArray[np.integer]) -> _Bits:
    """The 32-bit key of each (seed, position)."""
    return mix(seed_low ^ mix(seed_high ^ mix(positions.astype(np.uint32))))


def noise(keys: _Bits, token_ids: NDArray[np.integer]) -> NDArray[np.float32]:
    """Gumbel noise of ids under keys; shapes broadcast. The definition: a backend's own equals it up to rounding."""
    bits = mix(token_ids.astype(np.uint32) * _GOLDEN + keys) & np.uint32(0x7FFFFFFF)
    u = np.minimum((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2**-31), np.float32(1 - 2**-24))
    drawn: NDArray[np.float32] = -np.log(-np.log1p(-u))
    return drawn
