"""The text of one sequence, token by token: whole characters only, held back while it may become a stop string.

Invariant: the joined pieces equal one decoding of all tokens, wherever the tokens are cut. Bytes that can no longer
become a character turn into U+FFFD, as in any decoding; bytes that still can are held back for the next token.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

import msgspec

from tokenmill.text.pieces import Pieces
from tokenmill.text.tokenizer import Tokenizer

_WINDOW = 8  # earlier tokens that a decoder without a table decodes again
_MOST_WAITING = 3  # bytes of a character that is not whole yet; a decoder may write U+FFFD for each of them


class Piece(msgspec.Struct, gc=False):
    """The text of one token.

    `text`: its part of the answer, without special tokens and stop strings. `token_text`: the token's own text,
    complete; "" while its characters are not whole, and then the token that completes them has them. A token that is
    left out of the answer does not separate the bytes of a character before and behind it.
    """

    text: str
    token_text: str
    special: bool
    stopped: str | None = None  # the stop string that ends the answer with this token


class Detokenizer:
    """Decoder of the tokens behind a prompt. `push` ids in order, then `finish` once. A character that began in the
    prompt is part of the answer, whole.

    `stop`: strings that end the answer, wherever they are in the text. The text before one is emitted, and the string
    itself if `include_stop`. Of several, the one that is complete first ends it. Text of special tokens is compared,
    too, though it is not emitted. Nothing is emitted after a stop. `min_tokens`: a string that is complete with one of
    this many first tokens does not end the answer. `shown_ids`: special tokens that are emitted all the same. `begins`:
    the text begins with the first token, so that the space which a tokenizer writes before a first word is left out.
    """

    __slots__ = (
        "_begins", "_decode", "_decoder", "_early", "_hidden", "_include", "_matcher", "_parts", "_special", "_text_of",
    )  # fmt: skip

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
        prompt_ids: Sequence[int] = (),
        shown_ids: frozenset[int] = frozenset(),
        begins: bool = False,
    ) -> None:
        pieces = tokenizer.pieces
        self._begins, self._decode = begins, tokenizer.decode
        self._decoder: _Decoder = (
            _WindowDecoder(tokenizer, prompt_ids) if pieces is None else _PieceDecoder(pieces, prompt_ids)
        )
        self._text_of = tokenizer.token_text
        self._special = tokenizer.special_ids
        self._hidden: frozenset[int] = self._special - shown_ids if skip_special_tokens else frozenset()
        self._matcher = StopMatcher(stop) if stop else None
        self._include, self._early = include_stop, min_tokens
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text emitted so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_id: int) -> Piece:
        """Take the next token. Costs about a microsecond without stop strings."""
        shown = token_id not in self._hidden
        token_text = self._decoder.push(token_id) if shown else self._text_of(token_id)
        special = token_id in self._special
        if self._begins and shown:
            self._begins = False
            if token_text.startswith(" ") and not self._decode([token_id], False).startswith(" "):
                token_text = token_text[1:]
        if self._matcher is None:
            text, stopped = token_text if shown else "", None
        else:
            text, stopped = self._matcher.push(token_text, shown, self._include, ends=self._early <= 0)
            self._early -= 1
        if text:
            self._parts.append(text)
        return Piece(text, token_text, special, stopped)

    def finish(self) -> str:
        """End the answer, and emit the text that was held back. A character whose bytes never came is left out."""
        text = self._matcher.finish() if self._matcher is not None else ""
        if text:
            self._parts.append(text)
        return text


class StopMatcher:
    """Search for stop strings in a text that comes in parts. Text that cannot be part of one passes.

    Invariant: the result does not depend on how the text is cut. The string whose last character comes first ends the
    text; of two that end together, the longer one.
    """

    __slots__ = ("_done", "_early", "_first", "_held", "_longest", "_parts", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)  # none of them empty
        self._first = frozenset(stop[0] for stop in self._stops)
        self._longest = max(len(stop) for stop in self._stops)
        self._held = ""  # text that may begin a stop string
        self._early = 0  # number of its characters before which no string may end
        self._parts: list[tuple[str, bool]] = []  # the same text, and True for parts that are shown
        self._done = False

    def push(self, text: str, shown: bool, include: bool, *, ends: bool = True) -> tuple[str, str | None]:
        """Return the text that may be emitted, and the stop string that was found. `shown` False: `text` is compared
        only. `ends` False: a string that is complete with it does not end the text."""
        if self._done or not text:
            return "", None
        if not self._held and not any(character in text for character in self._first):
            return text if shown else "", None
        held = self._held + text
        self._parts.append((text, shown))
        if not ends:
            self._early = len(held)
        found = self._find(held)
        if found is None:
            kept = self._undecided(held)
            self._held, self._early = held[kept:], max(self._early - kept, 0)
            return self._take(kept), None
        start, end, stop = found
        emitted = self._take(end if include else start)
        self._held, self._parts, self._done = "", [], True
        return emitted, stop

    def finish(self) -> str:
        """End the text, and return what was held back."""
        text = self._take(len(self._held))
        self._held, self._done = "", True
        return text

    def _find(self, held: str) -> tuple[int, int, str] | None:
        starts = ((held.find(stop, max(self._early - len(stop) + 1, 0)), stop) for stop in self._stops)
        found = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if not found:
            return None
        end, start, stop = min(found)
        return start, end, stop

    def _undecided(self, held: str) -> int:
        """Return the beginning of the longest ending that is a beginning of a stop string."""
        for start in range(max(0, len(held) - self._longest + 1), len(held)):
            if held[start] in self._first and any(stop.startswith(held[start:]) for stop in self._stops):
                return start
        return len(held)

    def _take(self, count: int) -> str:
        """Remove that many characters from the front of the held text, and return those that are shown."""
        out: list[str] = []
        while count and self._parts:
            text, shown = self._parts[0]
            if shown:
                out.append(text[:count])
            if count < len(text):
                self._parts[0] = (text[count:], shown)
                break
            count -= len(text)
            del self._parts[0]
        return "".join(out)


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...


class _PieceDecoder:
    """Decoder with a table of pieces: most tokens are whole characters and cost one look-up."""

    __slots__ = ("_bytes_of", "_texts", "_waiting")

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int]) -> None:
        self._bytes_of, self._texts = pieces.bytes_of, pieces.texts
        self._waiting = b""  # the beginning of a character
        if prompt_ids and self._texts[prompt_ids[-1]] is None:  # a character begins in the prompt: show it whole
            for token_id in prompt_ids[-_MOST_WAITING:]:
                self.push(token_id)

    def push(self, token_id: int) -> str:
        whole = self._texts[token_id]
        if not self._waiting and whole is not None:
            return whole
        raw = self._waiting + self._bytes_of(token_id)
        text, used = utf_8_decode(raw, "replace", False)
        self._waiting = raw[used:]
        return text


class _WindowDecoder:
    """Decoder without a table: returns the text that one more token adds to the decoding of the last ones."""

    __slots__ = ("_decode", "_ids", "_read")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._ids = list(prompt_ids[-_WINDOW:])
        self._read = _without_waiting(self._decode(self._ids, False))  # number of characters that were emitted

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids, False)
        sure = _without_waiting(text)
        new = text[self._read : sure]
        self._read = max(self._read, sure)
        if len(self._ids) > 2 * _WINDOW:  # a character has far fewer tokens than are kept
            del self._ids[:-_WINDOW]
            self._read = _without_waiting(self._decode(self._ids, False))
        return new


def _without_waiting(text: str) -> int:
    """Return the length of a text without the end that further tokens may change."""
    end = len(text)
    while end and len(text) - end < _MOST_WAITING and text[end - 1] == "\ufffd":
        end -= 1
    return end
