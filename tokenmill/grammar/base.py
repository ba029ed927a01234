"""Interface between the engine and a grammar library: masks of allowed tokens, with one `Matcher` per sequence.

A `Backend` turns a `GrammarSpec` into a `Grammar` in two halves, so that the costly and dangerous one can run in
another process (`pool.py`): `prepare` checks and compiles there, `finish` completes the grammar in the process that
fills the masks.
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
"""The kind of a grammar written by a client, in Lark or EBNF. The kind "lark" is for grammars written by the server."""

_WORD = 32
_LONG_TEXT = re.compile(r'"(?:[^"\\]|\\.){2000}')
_LONG_PATTERN = 2000
_PRINTABLE = frozenset(range(0x20, 0x7F))
_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 256)}
_MANY = re.compile(r"\{(\d+,)?\d{3,}|\)\{(\d+,)?\d{2,}")


class Vocabulary(msgspec.Struct, frozen=True, array_like=True):
    """The part of a tokenizer that grammars use: the bytes of each token, and the tokens that are not text.

    `size` is the width of the logits. It may exceed the number of tokens; the ids beyond are never allowed. Special
    tokens match no text of a grammar, whatever they look like; end tokens are special.
    """

    tokens: tuple[bytes, ...]  # by id; b"": an id without text
    end_ids: tuple[int, ...]  # at least one; each ends an answer
    special_ids: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, token_bytes: Callable[[int], bytes], num_tokens: int, size: int, end_ids: Sequence[int],
           special_ids: Sequence[int]) -> Vocabulary:  # fmt: skip
        """Build the vocabulary of a tokenizer with `num_tokens` ids. Ids beyond the logits are cut off."""
        tokens = tuple(token_bytes(i) for i in range(min(num_tokens, size)))
        special = {i for i in (*special_ids, *end_ids) if i < size}
        return cls(tokens, tuple(i for i in dict.fromkeys(end_ids) if i < size), tuple(sorted(special)), size)

    def unspelled(self) -> frozenset[int]:
        """Return the bytes that UTF-8 uses and no token consists of. A text that has one may have no spelling."""
        special = set(self.special_ids)
        return _UTF8_BYTES.difference(
            text[0] for i, text in enumerate(self.tokens) if len(text) == 1 and i not in special
        )

    @property
    def mask_words(self) -> int:
        """Number of 32-bit words in one row of a mask."""
        return -(-self.size // _WORD)

    def new_mask(self, rows: int) -> Mask:
        """Return a mask `(rows, mask_words)` that forbids everything."""
        return np.zeros((rows, self.mask_words), np.uint32)


def may_demand(source: str) -> frozenset[int]:
    """Return the bytes of all texts that a grammar of this source can demand: of plain ASCII, only printable ones."""
    return _PRINTABLE if source.isascii() and "\\" not in source else _UTF8_BYTES


class Matcher(Protocol):
    """The position of one sequence in a grammar. Not thread-safe, but independent of other matchers."""

    def fill_mask(self, mask: Mask, row: int) -> None:
        """Overwrite one row: bit `id % 32` of word `id // 32` is 1 if the token may come next.

        End tokens are allowed where the grammar may end. Never raises: see `failure`.
        """

    def accept(self, token_id: int) -> bool:
        """Advance by one token. Return False, with the state unchanged, if the grammar does not allow it here."""

    def rollback(self, n: int) -> None:
        """Undo the last `n` accepted tokens, including end tokens. `n` is at most the number of accepted tokens."""

    def forced(self, most: int) -> list[int]:
        """Return up to `most` tokens that must come next, in order; [] if there is a choice, or only an end may follow.

        The matcher does not advance.
        """

    @property
    def done(self) -> bool:
        """True if only an end token, or nothing, may follow."""

    @property
    def failure(self) -> str:
        """The reason why the grammar cannot go on (a limit of the library was met), or "". Read it after `fill_mask`.

        After a failure the rows allow the end tokens only, and the generated text does not obey the grammar.
        """


class Grammar(Protocol):
    """A compiled grammar, shared by all sequences that use it. Thread-safe."""

    @property
    def nbytes(self) -> int:
        """Approximate memory use in bytes."""

    def matcher(self) -> Matcher:
        """Return a new matcher at the beginning of the grammar."""


class MaskFiller(Protocol):
    """A filler of mask rows for many matchers at once, on its own threads, which do not hold the interpreter lock."""

    def fill(self, pairs: Sequence[tuple[Matcher, int]], mask: Mask) -> None:
        """Run `fill_mask` for each matcher and its row in parallel; other rows are not touched.

        Blocks until all rows are filled. `mask` is contiguous; all matchers come from this filler's backend.
        """


class Backend(Protocol):
    """A library that compiles grammars for one vocabulary. Thread-safe."""

    vocabulary: Vocabulary

    def prepare(self, kind: str, source: str) -> bytes:
        """Do the costly half, in a process that may be killed. Raises GrammarError if it cannot be served."""

    def finish(self, prepared: bytes) -> Grammar:
        """Complete the grammar from the result of `prepare`, in the process that uses it."""

    def filler(self, num_threads: int) -> MaskFiller:
        """Return a new filler. It owns threads: make one and keep it."""


def needs_many_states(source: str) -> bool:
    """Return whether a grammar has repetitions that may need many states."""
    return _MANY.search(source) is not None


def may_force(kind: str, source: str) -> bool:
    """Return whether a matcher may look for forced text, that is, whether such text is surely short.

    The library follows forced text to its end in one call, so text of thousands of characters would delay a step, and
    endless text would block it. Only a client's grammar can force endless text: `a: "x" a`, or a lexeme that runs into
    the text after it. Takes milliseconds for a large source.
    """
    if kind == CLIENTS or needs_many_states(source):
        return False
    return len(source) <= _LONG_PATTERN if kind == "regex" else _LONG_TEXT.search(source) is None


def only_ends(vocabulary: Vocabulary) -> NDArray[np.uint32]:
    """Return a row that allows the end tokens only."""
    row: NDArray[np.uint32] = vocabulary.new_mask(1)[0]
    for token_id in vocabulary.end_ids:
        row[token_id // _WORD] |= np.uint32(1 << token_id % _WORD)
    return row


def longest_tokens(vocabulary: Vocabulary) -> Encode:
    """Return an encoder that takes the longest matching token, from the left, as most tokenizers nearly do."""
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
                break  # no token spells this byte, so the text ends before it
        return ids

    return encode


def exact(encode: Encode | None, vocabulary: Vocabulary) -> Encode:
    """Wrap `encode` so that a result which does not spell its input exactly is replaced by the longest tokens.

    Some tokenizers put a space before a text, or normalize it. `encode` None: always the longest tokens.
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
