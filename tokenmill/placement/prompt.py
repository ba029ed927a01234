"""Keys of the prefixes of a prompt, from token ids or from text.

A key is the hash of everything before one of the `EDGES`, which are positions that are the same for all prompts. They
lie 16 tokens apart at first, a cache block of the engine, and an eighth of their position later, so a prompt of 2,000
tokens has 34 keys and one of a million has 87: the length of a common prefix is found to an eighth or better.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import NamedTuple

_BLOCK = 16  # tokens
_CHARACTERS = 4  # of a text that count as one token, where there is no tokenizer
KEY_BYTES = 8
"""Length of a key. Keys only guide placement: a collision costs a cache miss at worst."""


def _edges(block: int, length: int) -> Iterator[int]:
    """Yield the positions of keys up to `length`: multiples of `block`, apart by an eighth of their position."""
    position = block
    while position <= length:
        yield position
        position += max(block, position // 8 // block * block)


EDGES = tuple(_edges(_BLOCK, 1 << 24))
"""Positions of keys, in tokens."""


class Prompt(NamedTuple):
    """The prefixes of a prompt. `keys[i]`: hash of its first `EDGES[i]` tokens; `num_tokens`: of the whole prompt."""

    keys: list[bytes]
    num_tokens: int


def prompt_of_tokens(token_ids: Iterable[int], salt: bytes = b"") -> Prompt:
    """Return the prefixes of token ids. `salt`: prompts with different salts share none."""
    data = array("I", token_ids).tobytes()
    return Prompt(_keys(data, 4, salt), len(data) // 4)


def prompt_of_text(text: str, salt: bytes = b"") -> Prompt:
    """Return the prefixes of a text, where no tokenizer is at hand. Four bytes of UTF-8 count as a token."""
    data = text.encode("utf-8", "surrogatepass")
    return Prompt(_keys(data, _CHARACTERS, salt), -(-len(data) // _CHARACTERS))


def _keys(data: bytes, width: int, salt: bytes) -> list[bytes]:
    """Return the hash chain of `data` at the edges. `width`: bytes of a token."""
    key, begin, keys = blake2b(salt, digest_size=KEY_BYTES).digest(), 0, []
    for edge in EDGES:
        end = edge * width
        if end > len(data):
            break
        key = blake2b(key + data[begin:end], digest_size=KEY_BYTES).digest()
        keys.append(key)
        begin = end
    return keys
