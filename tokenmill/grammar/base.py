"""What a grammar is to the engine: masks of allowed tokens, one `Matcher` a sequence, whichever library computes them.

A `Backend` turns a `GrammarSpec` into a `Grammar` in two halves, so that the costly and dangerous one can run in
another process (`pool.py`): `prepare` checks and compiles, `finish` makes what is left, where the masks are filled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

Encode = Callable[[bytes], Sequence[int]]
Mask = NDArray[np.uint32]

CLIENTS = "grammar"
"""The kind of a grammar that a client wrote, in Lark or EBNF. The kind "lark" is for those that are made here."""

_WORD = 32
_LONG_TEXT = re.compile(r'"(?:[^"\\]|\\.){2000}')
_LONG_PATTERN = 2000
_MANY = re.compile(r"\{(\d+,)?\d{3,}|\)\{(\d+,)?\d{2,}")


class Vocabulary(msgspec.Struct, frozen=True, array_like=True):
    """What a grammar needs of a tokenizer: the bytes of each token, and which tokens are not text.

    `size` is the width of the logits and may exceed the number of tokens: the rest is never allowed. Special tokens
    match no text of a grammar, whatever they look like; end tokens are special.
    """

    tokens: tuple[bytes, ...]  # by id; b"": an id without text
    end_ids: tuple[int, ...]  # at least one; each ends an answer
    special_ids: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, token_bytes: Callable[[int], bytes], num_tokens: int, size: int, end_ids: Sequence[int],
           special_ids: Sequence[int]) -> Vocabulary:  # fmt: skip
        """The vocabulary of a tokenizer with `num_tokens` ids. Ids beyond the logits are cut off."""
        tokens = tuple(token_bytes(i) for i in range(min(num_tokens, size)))
        special = {i for i in (*special_ids, *end_ids) if i < size}
        return cls(tokens, tuple(i for i in dict.fromkeys(end_ids) if i < size), tuple(sorted(special)), size)

    @property
    def mask_words(self) -> int:
        """32-bit words of one row of a mask."""
        return -(-self.size // _WORD)

    def new_mask(self, rows: int) -> Mask:
        """A mask `(rows, mask_words)` that forbids everything."""
        return np.zeros((rows, self.mask_words), np.uint32)


class Matcher(Protocol):
    """One sequence's place in a grammar. Not thread-safe; different matchers may be used by different threads."""

    def fill_mask(self, mask: Mask, row: int) -> None:
        """Overwrite one row: bit `id % 32` of word `id // 32` is 1 if the token may come next.

        End tokens are allowed where the grammar may end. Never raises: see `failure`.
        """

    def accept(self, token_id: int) -> bool:
        """Go on by one token. False, and nothing has changed, if the grammar does not allow it here."""

    def rollback(self, n: int) -> None:
        """Take the last `n` accepted tokens back, end tokens too. `n` is at most what was accepted."""

    def forced(self, most: int) -> list[int]:
        """Up to `most` tokens that must come next, in order; [] if there is a choice, or only the end may follow.

        They are not accepted yet.
        """

    @property
    def done(self) -> bool:
        """True if only an end token may follow, or nothing."""

    @property
    def failure(self) -> str:
        """Why the grammar cannot go on (a limit of the library was met), or "". Look after a mask was filled.

        Its rows then allow the end tokens only, and what was generated does not obey.
        """


class Grammar(Protocol):
    """A compiled grammar, shared by all sequences that use it. Thread-safe."""

    @property
    def nbytes(self) -> int:
        """Roughly the memory it takes."""

    def matcher(self) -> Matcher:
        """A new place at the beginning."""


class MaskFiller(Protocol):
    """Fills rows of many matchers at once, on threads of its own that do not need the interpreter."""

    def fill(self, pairs: Sequence[tuple[Matcher, int]], mask: Mask) -> None:
        """`fill_mask` for each matcher and its row, all at once; other rows are not touched. `mask` is contiguous, all
        matchers come from this filler's backend. Blocks until all are filled."""


class Backend(Protocol):
    """A library that compiles grammars for one vocabulary. Thread-safe."""

    vocabulary: Vocabulary

    def prepare(self, kind: str, source: str) -> bytes:
        """The costly half, for a process that may be killed. GrammarError says what is wrong or cannot be served."""

    def finish(self, prepared: bytes) -> Grammar:
        """The other half, where the grammar will be used: of what `prepare` returned."""

    def filler(self, num_threads: int) -> MaskFiller:
        """A new filler. Make one and keep it."""


def needs_many_states(source: str) -> bool:
    """Whether a grammar has repetitions that may need many states."""
    return _MANY.search(source) is not None


def may_force(kind: str, source: str) -> bool:
    """Whether a matcher may look for text that leaves no choice: such text is neither endless nor thousands of
    characters long, which the libraries would all look at in one call.

    Endless it can be in a client's grammar alone: `a: "x" a`, or behind a lexeme that runs into what follows it. Takes
    milliseconds for a large source.
    """
    if kind == CLIENTS or needs_many_states(source):
        return False
    return len(source) <= _LONG_PATTERN if kind == "regex" else _LONG_TEXT.search(source) is None


def only_ends(vocabulary: Vocabulary) -> NDArray[np.uint32]:
    """A row that allows the end tokens alone."""
    row: NDArray[np.uint32] = vocabulary.new_mask(1)[0]
    for token_id in vocabulary.end_ids:
        row[token_id // _WORD] |= np.uint32(1 << token_id % _WORD)
    return row


def longest_tokens(vocabulary: Vocabulary) -> Encode:
    """Cuts text into the longest tokens there are, from the left: close to what most tokenizers do."""
    special = set(vocabulary.special_ids)
    id_of = {text: i for i, text in enumerate(vocabulary.tokens) if text and i not in special}
    longest = max(map(len, id_of), default=0)

    def encode(text: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            for end in range(min(len(text), at + longest), at, -1):
                token_id = id_of.get(text[at:end])
                if token_id is not None:
                    ids.append(token_id)
                    at = end
                    break
            else:
                break  # a byte that no token spells: what comes before it is all there is
        return ids

    return encode


def exact(encode: Encode | None, vocabulary: Vocabulary) -> Encode:
    """`encode` where its tokens spell exactly what they were made of, else the longest tokens.

    Some tokenizers put a space before a text, or normalize it.
    """
    fallback = longest_tokens(vocabulary)
    if encode is None:
        return fallback
    tokens, special = vocabulary.tokens, set(vocabulary.special_ids)

    def checked(text: bytes) -> Sequence[int]:
        ids = encode(text)
        if any(i >= len(tokens) or i in special for i in ids) or b"".join(tokens[i] for i in ids) != text:
            return fallback(text)
        return ids

    return checked
