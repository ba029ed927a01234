"""The green list of a watermark: `backends.sampling.green_ids`, compiled. It takes some tenths of a millisecond a row.

`s`: a thread's scratch (`sampling_layout.py`).
"""

from __future__ import annotations

from tokenmill.backends.cpu.ir import inline, peek, peek32
from tokenmill.backends.cpu.sampling_layout import IDS, TWISTER
from tokenmill.backends.cpu.sampling_vectors import Real, peek_float, poke32, poke_float, word
from tokenmill.backends.sampling import WATERMARK_KEY

_WORDS, _MIDDLE = 624, 397  # constants of the Mersenne Twister MT19937
_ALL = 0xFFFFFFFF
_HIGH, _LOW = 0x80000000, 0x7FFFFFFF


@inline
def _seed(state: int, seed: int) -> None:
    value = seed & _ALL
    poke32(state, value)
    for i in range(1, _WORDS):
        value = (1812433253 * (value ^ (value >> 30)) + i) & _ALL
        poke32(state + 4 * i, value)


@inline
def _twist(state: int) -> None:
    for i in range(_WORDS):
        following = i + 1 if i + 1 < _WORDS else 0
        distant = i + _MIDDLE if i + _MIDDLE < _WORDS else i + _MIDDLE - _WORDS
        mixed = (peek32(state + 4 * i) & _HIGH) | (peek32(state + 4 * following) & _LOW)
        value = (peek32(state + 4 * distant) & _ALL) ^ (mixed >> 1)
        poke32(state + 4 * i, value ^ 0x9908B0DF if mixed & 1 != 0 else value)


@inline
def _tempered(value: int) -> int:
    value &= _ALL
    value ^= value >> 11
    value ^= (value << 7) & 0x9D2C5680
    value ^= (value << 15) & 0xEFC60000
    return value ^ (value >> 18)


@inline
def favour_green(s: int, x: int, vocab: int, previous: int, gamma: float, delta: Real) -> None:
    """Add `delta` to the logits of the ids in the green list of the token `previous`."""
    state, ids, count = peek(s + TWISTER), peek(s + IDS), int(vocab * gamma)
    for i in range(vocab):
        poke32(ids + 4 * i, i)
    _seed(state, WATERMARK_KEY * previous)
    for i in range(count):
        if i % _WORDS == 0:
            _twist(state)
        other = i + _tempered(peek32(state + 4 * (i % _WORDS))) % (vocab - i)
        token = peek32(ids + 4 * other)
        poke32(ids + 4 * other, peek32(ids + 4 * i))
        poke_float(x + 4 * token, word(peek_float(x + 4 * token) + delta))
