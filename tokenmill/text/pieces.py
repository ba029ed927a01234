"""The bytes of each token of a vocabulary, with which text is streamed without decoding twice.

Two families cover nearly all models. Byte-level BPE writes each byte as one printable character. SentencePiece writes a
space as "▁" and a byte that is not a character of its vocabulary as <0x0A>. In both, the bytes of a text are the bytes
of its tokens one after another, so a token is looked up once. Other decoders have no such table; `detokenizer.py` has a
slower way for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_HARMLESS = {"Fuse", "ByteFallback"}  # decoders of SentencePiece's family whose fields do not matter


def byte_characters() -> dict[str, int]:
    """Return the byte of each character with which GPT-2's byte-level BPE writes one."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


def spelling(decoder: Any) -> Callable[[str], bytes] | None:
    """Return a function from a token to its bytes for a decoder of `tokenizers`; None if they depend on its
    neighbours."""
    if decoder is None:
        return None
    found = json.loads(decoder.__getstate__())
    steps = found.get("decoders", []) if found["type"] == "Sequence" else [found]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level()
    fused = "Strip" not in kinds or "Fuse" in kinds[: kinds.index("Strip")]  # else each token is stripped
    if steps and fused and all(_of_sentencepiece(step) for step in steps):
        return _sentencepiece_with_bytes if "ByteFallback" in kinds else _sentencepiece
    return None


class Pieces:
    """Bytes and text of tokens, each looked up once. Safe to share between threads.

    `texts[id]` is the token's text, or None if its bytes are not whole characters by themselves. Do not use
    `texts.get`, because entries are made at their first access.
    """

    def __init__(self, token_of: Callable[[int], str | None], spell: Callable[[str], bytes]) -> None:
        self._token_of, self._spell = token_of, spell
        self.texts = _Texts(self)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the token's bytes; none for an id that the vocabulary lacks (a padded row of the embedding)."""
        token = self._token_of(token_id)
        return b"" if token is None else self._spell(token)


class _Texts(dict[int, str | None]):
    def __init__(self, pieces: Pieces) -> None:
        super().__init__()
        self._pieces = pieces

    def __missing__(self, token_id: int) -> str | None:
        try:
            text: str | None = self._pieces.bytes_of(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


def _byte_level() -> Callable[[str], bytes]:
    table = byte_characters()

    def spell(token: str) -> bytes:
        try:
            return bytes([table[character] for character in token])
        except KeyError:  # an added token, written as it is
            return token.encode()

    return spell


def _of_sentencepiece(step: dict[str, Any]) -> bool:
    kind = step["type"]
    if kind == "Replace":
        return bool(step["pattern"] == {"String": "▁"} and step["content"] == " ")
    if kind == "Strip":  # the space before the first word, which a continuation does not have
        return bool(step["content"] == " " and not step["stop"])
    return kind in _HARMLESS or (kind == "Metaspace" and step["replacement"] == "▁")


def _sentencepiece(token: str) -> bytes:
    return token.replace("▁", " ").encode()


def _sentencepiece_with_bytes(token: str) -> bytes:
    found = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else _sentencepiece(token)
