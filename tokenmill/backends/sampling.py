"""The rules of sampling, for every backend: parameters by slot, the order of the steps, the source of randomness.

The order, for one row of logits (`STEPS` has the names of steps 0b to 9):

0. a mask (`backends.base.Masks`) sets the logits of the ids that it does not allow to minus infinity. Banned ids stay
   so, and log-probabilities that are not raw are normalized over the ids left. A row without any id left, here or
   below, gives -1, as does one whose logits are not finite;
   b. a watermark adds `watermark_delta` to the green ids (`green_ids`), a share `watermark_gamma` of all;
1. `logit_bias` is added;
2. repetition penalty r, CTRL's rule, once for each id in prompt or output: a negative logit times r, others over r;
3. frequency penalty times the id's count in the output, presence penalty once if it is there at all: subtracted;
4. stop ids are banned while fewer than `min_new_tokens` were generated: biases of minus infinity, added in 1;
5. temperature divides (LEAST_TEMPERATURE at least); at 0 the likeliest is taken and no step below applies;
6. min_p keeps the ids at least min_p times as likely as the likeliest;
7. top_k keeps the k likeliest, and those that tie with the last of them;
8. top_p keeps an id if all that are likelier make up less than top_p together, of the ids left;
9. typical_p keeps an id if all that are more typical (log-probability nearer to minus the entropy) make up less than
   typical_p together, of the ids left;
10. the largest of score + noise is chosen (the Gumbel-max way to sample from the softmax of the scores).

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

from tokenmill.backends.base import Tail
from tokenmill.wire.messages import Request

PARAMETERS = np.dtype(
    [
        ("temperature", np.float32),
        ("seed_low", np.uint32),
        ("seed_high", np.uint32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("typical_p", np.float32),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("num_prompt", np.int32),
        ("num_biases", np.int32),
        ("raw_logprobs", np.int32),
        ("logprobs", np.int32),
        ("prompt_logprobs", np.int32),
        ("watermark_delta", np.float32),
        ("watermark_gamma", np.float64),
    ]
)
"""Layout of a slot's parameters. Host kernels read a field by its byte offset, device kernels by its column.

`num_biases`: entries in use of the slot's row of biases. `repetition`, `frequency`, `presence` are neighbours.
"""

COLUMNS = 16
"""Numbers of 32 bits that a slot's row has on a device: the first fields of PARAMETERS, floats by their bits."""

STEPS = ("watermark", "biases", "penalties", "min_p", "top_k", "top_p", "typical_p")
"""Steps that only some rows need, in their order. Masks come before, the temperature before min_p."""

FILTERS = STEPS[3:]
"""Steps that remove ids. A row that takes the likeliest id skips them."""

TAILS: tuple[Tail, ...] = ("greedy", "plain", "full")
"""From the least work to the most; each does the work of those before."""

LEAST_TEMPERATURE = 1e-6

WATERMARK_KEY = 15_485_863
"""The seed of the green ids is this times the id of the token before."""

MOST_TIES = 16
"""The most ids that a row lists beyond the requested number: ids that tie with the last one. Not with raw
log-probabilities."""

FOREVER = np.iinfo(np.int32).max
_GOLDEN = np.uint32(0x9E3779B9)
_Bits = NDArray[np.uint32]


class Parameters:
    """Sampling parameters of all slots, on the host; a step's rows are `rows[slots]`.

    Biases are sparse: to the logit of `bias_ids[slot, i]`, `bias_values[slot, i]` is added while the position is below
    `bias_until[slot, i]`. A banned stop id is a bias of minus infinity that ends. Entries beyond `num_biases` are
    (id 0, value 0), which has no effect, so whole rows may be added.
    """

    def __init__(self, num_slots: int) -> None:
        self.rows = np.zeros(num_slots, PARAMETERS)
        self.bias_ids = np.zeros((num_slots, 0), np.int32)
        self.bias_values = np.zeros((num_slots, 0), np.float32)
        self.bias_until = np.zeros((num_slots, 0), np.int32)

    def admit(self, slot: int, request: Request) -> None:
        """Overwrite a slot's parameters with those of a request."""
        biases = biases_of(request)
        self.rows[slot] = row_of(request)[0]
        self._widen(len(biases))
        self.bias_ids[slot], self.bias_values[slot], self.bias_until[slot] = 0, 0, 0
        for i, (token_id, value, until) in enumerate(biases):
            self.bias_ids[slot, i], self.bias_values[slot, i], self.bias_until[slot, i] = token_id, value, until

    def _widen(self, width: int) -> None:
        """Make room for `width` biases a slot; doubled, so that it is rare."""
        missing = width - self.bias_ids.shape[1]
        if missing > 0:
            add = ((0, 0), (0, max(missing, self.bias_ids.shape[1])))
            self.bias_ids = np.pad(self.bias_ids, add)
            self.bias_values = np.pad(self.bias_values, add)
            self.bias_until = np.pad(self.bias_until, add)


def row_of(request: Request) -> NDArray[np.void]:
    """Return a request's parameters, (1,) of PARAMETERS."""
    p, seed = request.sampling, request.sampling.seed % 2**64
    row = np.zeros(1, PARAMETERS)
    row[0] = (
        p.temperature,
        seed % 2**32,
        seed >> 32,
        p.top_k,
        p.top_p,
        p.min_p,
        p.typical_p,
        p.repetition_penalty,
        p.frequency_penalty,
        p.presence_penalty,
        len(request.prompt_ids),
        len(biases_of(request)),
        p.raw_logprobs,
        p.logprobs,
        p.prompt_logprobs,
        p.watermark_delta,
        p.watermark_gamma,
    )
    return row


def biases_of(request: Request) -> list[tuple[int, float, int]]:
    """Return a request's biases: (id, value, position where it ends). Banned stop ids are among them."""
    biases = [(token_id, value, FOREVER) for token_id, value in request.sampling.logit_bias]
    if request.stopping.min_new_tokens > 0:
        until = len(request.prompt_ids) + request.stopping.min_new_tokens
        biases += [(token_id, -np.inf, until) for token_id in request.stopping.stop_ids]
    return biases


def column(name: str) -> int:
    """Return the place of a field among the 32-bit numbers of a row; below COLUMNS for all that devices read."""
    return offset(name) // 4


def offset(name: str) -> int:
    """Return the byte offset of a field in a row."""
    assert PARAMETERS.fields is not None
    return int(PARAMETERS.fields[name][1])


def device_rows(rows: NDArray[np.void]) -> NDArray[np.int32]:
    """Return rows of parameters as a device keeps them: (n, COLUMNS), of memory of its own."""
    return rows.view(np.int32).reshape(len(rows), -1)[:, :COLUMNS].copy()


# ---- rules: which rows need which work ----


def is_random(rows: NDArray[np.void]) -> NDArray[np.bool_]:
    """Return which rows of parameters sample; the others take the likeliest id."""
    mask: NDArray[np.bool_] = rows["temperature"] > 0
    return mask


def active_steps(rows: NDArray[np.void], vocab_size: int = FOREVER) -> dict[str, NDArray[np.bool_]]:
    """Return for each of STEPS, in their order, which rows of parameters need it."""
    random = is_random(rows)
    return {
        "watermark": rows["watermark_gamma"] > 0,
        "biases": rows["num_biases"] > 0,
        "penalties": (rows["repetition"] != 1) | (rows["frequency"] != 0) | (rows["presence"] != 0),
        "min_p": (rows["min_p"] > 0) & random,
        "top_k": (rows["top_k"] > 0) & (rows["top_k"] < vocab_size) & random,
        "top_p": (rows["top_p"] < 1) & random,
        "typical_p": (rows["typical_p"] < 1) & random,
    }


def tail_of(rows: NDArray[np.void]) -> Tail:
    """Return the least tail that does the work of all rows of parameters."""
    if any(needed.any() for needed in active_steps(rows).values()):
        return "full"
    return "plain" if is_random(rows).any() else "greedy"


def num_listed(wanted: NDArray[np.int32], ties: NDArray[np.bool_], vocab_size: int) -> int:
    """Return the number of likeliest ids to look for. `wanted`: of each row; `ties`: rows that list ties, too."""
    most = max(int(wanted.max(initial=0)), 0)
    return min(most + MOST_TIES, vocab_size) if most and ties.any() else most


# ---- randomness ----


def green_ids(previous_id: int, gamma: float, vocab_size: int) -> NDArray[np.int64]:
    """Return the ids that a watermark favours behind a token: the first of a random permutation of all.

    The permutation is torch's `randperm` on a CPU: Mersenne twister, then Fisher-Yates. This is the definition; the
    backends have equal, faster code.
    """
    draw = np.random.RandomState(WATERMARK_KEY * previous_id % 2**32)
    count, ids = int(vocab_size * gamma), np.arange(vocab_size)
    bits = draw.randint(0, 2**32, min(count, vocab_size - 1), np.uint32)
    for i, other in enumerate((i + bits % (vocab_size - i) for i, bits in enumerate(bits.tolist()))):
        ids[i], ids[other] = ids[other], ids[i]
    return ids[:count]


def mix(x: _Bits) -> _Bits:
    """Apply lowbias32, a bijection of 32-bit integers that looks random."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def noise_keys(seed_low: _Bits, seed_high: _Bits, positions: NDArray[np.integer]) -> _Bits:
    """Return the 32-bit key of each (seed, position)."""
    return mix(seed_low ^ mix(seed_high ^ mix(positions.astype(np.uint32))))


def noise(keys: _Bits, token_ids: NDArray[np.integer]) -> NDArray[np.float32]:
    """Return the Gumbel noise of ids under keys; shapes broadcast. The definition: backends equal it up to rounding."""
    bits = mix(token_ids.astype(np.uint32) * _GOLDEN + keys) & np.uint32(0x7FFFFFFF)
    u = np.minimum((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2**-31), np.float32(1 - 2**-24))
    drawn: NDArray[np.float32] = -np.log(-np.log1p(-u))
    return drawn
