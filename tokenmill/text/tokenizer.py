"""Strings to token ids and back, and the model's special tokens.

`load.py` reads three origins: `tokenizer.json`, the metadata of a GGUF file (`gguf_vocabulary.py`) and SentencePiece's
`tokenizer.model` (`sentencepiece.py`). Encoding releases the interpreter's lock and may be called from many threads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import tokenizers

from tokenmill.errors import ValidationError
from tokenmill.text.chat_template import ChatTemplate
from tokenmill.text.library import is_library_error
from tokenmill.text.pieces import Pieces, spelling

_log = logging.getLogger(__name__)


class Offset(NamedTuple):
    """A token and the bytes of the UTF-8 input that it covers; "" and 0, 0 for a token that was added."""

    id: int
    text: str
    start: int
    stop: int


class Tokenizer:
    """One model's vocabulary. Immutable; every method may be called from any thread.

    `bos_token`, `eos_token`: their texts, or None. `eos_ids`: all ids that end an answer. `max_length`: tokens that the
    tokenizer's own configuration allows, or None. `chat_template`: None if the model has none. `vocab_size`: the
    highest id plus one. `answer_start`: ids behind a prompt that begin the answer of an encoder and decoder; else ().
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        eos_ids: Sequence[int] = (),
        max_length: int | None = None,
        chat_template: ChatTemplate | None = None,
        answer_start: Sequence[int] = (),
    ) -> None:
        inner.no_truncation()  # some tokenizer.json files have those of their training
        inner.no_padding()
        self._inner = inner
        self.bos_token, self.eos_token = bos_token, eos_token
        self.eos_ids: tuple[int, ...] = tuple(eos_ids)
        self.max_length, self.chat_template = max_length, chat_template
        self.answer_start: tuple[int, ...] = tuple(answer_start)
        added = inner.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size: int = max([inner.get_vocab_size(True), *(token_id + 1 for token_id in added)])
        spell = spelling(inner.decoder)
        self.pieces: Pieces | None = Pieces(inner.id_to_token, spell) if spell else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`. `add_special_tokens`: with BOS and the like, where the model has them.

        Takes about 6 ms per 1,000 tokens, without holding the interpreter's lock. Raises ValidationError for invalid
        text.
        """
        ids: list[int] = self._encodings(self._inner.encode_batch_fast, text, add_special_tokens).ids
        return ids

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True) -> Iterator[Offset]:
        """Yield the tokens of `text` and their places in its UTF-8 bytes, special tokens included. Encodes at the first
        one."""
        found = self._encodings(self._inner.encode_batch, text, add_special_tokens)
        byte_at = _byte_positions(text)
        raw = text.encode()
        for i, token_id in enumerate(found.ids):
            at = found.token_to_chars(i)  # `found.offsets` of a million tokens would block other threads
            if at is None:
                yield Offset(token_id, "", 0, 0)
                continue
            start, stop = at
            first, last = (start, stop) if byte_at is None else (byte_at[start], byte_at[stop])
            yield Offset(token_id, raw[first:last].decode(errors="replace"), first, last)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of a whole sequence. Bytes that are not characters become U+FFFD; no others are lost."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if "\ufffd" not in text or self.pieces is None:
            return text
        shown = [i for i in ids if not (skip_special_tokens and i in self._special)]
        raw = b"".join(map(self.pieces.bytes_of, shown))  # the library drops whole runs of bytes for an invalid one
        return self._without_lead(shown, raw.decode(errors="replace"))

    def _without_lead(self, ids: Sequence[int], text: str) -> str:
        """Return `text` without the space that the decoder drops before a sequence's first word."""
        if not ids:
            return text
        alone = self._inner.decode([ids[0]], skip_special_tokens=False)
        dropped = max(len(self.token_text(ids[0])) - len(alone), 0)
        return text[dropped:] if text[:dropped].isspace() else text

    def token_text(self, token_id: int) -> str:
        """Return a token's text inside of a sequence: with the space before a word; half a character is U+FFFD."""
        if self.pieces is None:
            return self.decode([token_id], skip_special_tokens=False)
        whole = self.pieces.texts[token_id]
        return self.pieces.bytes_of(token_id).decode(errors="replace") if whole is None else whole

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's bytes: exact where a table of pieces exists, else those of `token_text`."""
        return self.token_text(token_id).encode() if self.pieces is None else self.pieces.bytes_of(token_id)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary writes it, or None."""
        found: int | None = self._inner.token_to_id(token)
        return found

    def is_special(self, token_id: int) -> bool:
        """Return True for tokens that are left out of an answer's text."""
        return token_id in self._special

    @property
    def grammar_end_ids(self) -> tuple[int, ...]:
        """All ids that end an answer that obeys a grammar.

        They are those of `eos_ids` that are special or longer than a byte, or all if there are none of these: without
        a token of one byte, such as a quotation mark that config.json names as the end, JSON could not be spelled.
        """

        def is_text(i: int) -> bool:
            return i < self.vocab_size and i not in self._special and len(self.token_bytes(i)) == 1

        return tuple(i for i in self.eos_ids if not is_text(i)) or self.eos_ids

    @property
    def special_ids(self) -> frozenset[int]:
        """All ids for which `is_special` is true."""
        return self._special

    def _encodings(self, encode_batch: Any, text: str, add_special_tokens: bool) -> Any:
        # Batches of one, because only the batch calls release the interpreter's lock.
        try:
            return encode_batch([text], add_special_tokens=add_special_tokens)[0]
        except (TypeError, UnicodeEncodeError):  # lone surrogates, which JSON can carry
            raise ValidationError("tokenizer error: the text has characters that cannot be written in UTF-8") from None
        except BaseException as error:
            if not is_library_error(error):
                raise
            _log.debug("The library tokenizers cannot cut a text", exc_info=error)
            raise ValidationError("tokenizer error: the model's tokenizer cannot cut this text") from None


def _byte_positions(text: str) -> list[int] | None:
    """Return where each character begins in UTF-8, and where the last ends; None if all are one byte long."""
    if text.isascii():
        return None
    at, positions = 0, [0]
    for character in text:
        code = ord(character)
        at += 1 if code < 0x80 else 2 if code < 0x800 else 3 if code < 0x10000 else 4
        positions.append(at)
    return positions


def fixed_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...] | None:
    """Return the tokens of a text that do not depend on the text around it; None if they may."""
    ids = tokenizer.encode(text, False)
    fixed = len(ids) == 1 or (bool(ids) and tokenizer.is_special(ids[0]) and tokenizer.is_special(ids[-1]))
    return tuple(ids) if fixed else None


def special_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """Return the special tokens among some texts, by text."""
    found = ((text, tokenizer.token_id(text)) for text in texts)
    return {text: i for text, i in found if i is not None and tokenizer.is_special(i)}
