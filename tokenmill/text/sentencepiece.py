"""SentencePiece's vocabularies, without its library: `tokenizer.model` files, and the same content from GGUF metadata.

A `tokenizer.model` is a protobuf message, of which a dozen fields are read by hand. The vocabulary becomes a tokenizer
of the `tokenizers` library: the BPE kind gets the merges that its scores imply, the unigram kind its scores.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path

import msgspec
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from tokenmill.errors import ModelError
from tokenmill.text.library import reading
from tokenmill.weights.source import refuse_pointer

_UNIGRAM, _BPE = 1, 2
_LONGEST_PIECE = 512  # characters; the time for a piece's merges grows with the square


class Kind(IntEnum):
    """Kinds of pieces, with SentencePiece's numbers, which GGUF uses too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary(msgspec.Struct):
    """Everything that decides how a text is cut. Lists have one entry for each token, by id."""

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    unigram: bool = False
    byte_fallback: bool = True
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""  # a compiled Unicode normalization
    merges: list[tuple[str, str]] = []  # pairs in the order in which they are merged; none: those that scores imply


def load(path: Path, *, legacy: bool = True) -> tokenizers.Tokenizer:
    """Read a `tokenizer.model`. `legacy`: put a space before the text behind every special token, not only the
    first."""
    refuse_pointer(path)
    try:
        raw = path.read_bytes()
        vocabulary = parse(raw)
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e}.") from None
    except ValueError as e:
        why = "text that is no UTF-8" if isinstance(e, UnicodeDecodeError) else e
        raise ModelError(f"{path} is no SentencePiece model: {why}. Download the file again.") from None
    if not vocabulary.pieces:
        raise ModelError(f"{path} is no SentencePiece model: it has no pieces. Download the file again.")
    with reading(path):
        return build(vocabulary, legacy=legacy)


def build(vocabulary: Vocabulary, *, legacy: bool = True) -> tokenizers.Tokenizer:
    """Return a tokenizer that cuts as SentencePiece does. Its ids are the indices of the lists."""
    unknown = next((i for i, kind in enumerate(vocabulary.kinds) if kind == Kind.UNKNOWN), None)
    model: models.Model
    if vocabulary.unigram:
        model = models.Unigram(
            list(zip(vocabulary.pieces, vocabulary.scores, strict=True)), unknown, vocabulary.byte_fallback
        )
    else:
        ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}
        model = models.BPE(
            ids,
            vocabulary.merges or _merges(vocabulary),
            unk_token=None if unknown is None else vocabulary.pieces[unknown],
            fuse_unk=True,
            byte_fallback=vocabulary.byte_fallback,
        )
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = _normalizer(vocabulary, legacy)
    if vocabulary.add_dummy_prefix and not legacy:
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", "first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if vocabulary.add_dummy_prefix else []))
    add_tokens(inner, vocabulary.pieces, vocabulary.kinds)
    return inner


def add_tokens(inner: tokenizers.Tokenizer, pieces: Sequence[str], kinds: Sequence[int]) -> None:
    """Make control tokens and user-defined ones be found in texts as a whole; the former are special."""
    control = (Kind.CONTROL, Kind.UNKNOWN)
    added = [
        AddedToken(piece, special=kind in control, normalized=False)
        for piece, kind in zip(pieces, kinds, strict=True)
        if piece and (kind in control or kind == Kind.USER_DEFINED)
    ]
    inner.add_special_tokens([token for token in added if token.special])
    inner.add_tokens([token for token in added if not token.special])


def parse(raw: bytes) -> Vocabulary:
    """Return the relevant fields of a ModelProto. Raises ValueError if the bytes are not one."""
    found = Vocabulary([], [], [], byte_fallback=False)
    for field, value in _fields(raw):
        if field == 1:
            piece, score, kind = _piece(_bytes(value))
            found.pieces.append(piece)
            found.scores.append(score)
            found.kinds.append(kind)
        elif field == 2:
            _trainer(found, _bytes(value))
        elif field == 3:
            _normalization(found, _bytes(value))
    return found


def _piece(raw: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, int(Kind.NORMAL)
    for field, value in _fields(raw):
        if field == 1:
            text = _bytes(value).decode()
        elif field == 2:
            score = _float(_bytes(value))
        elif field == 3:
            kind = _number(value)
    return text, score, kind


def _trainer(found: Vocabulary, raw: bytes) -> None:
    kind = _UNIGRAM  # the default of an absent field
    for field, value in _fields(raw):
        if field == 3:
            kind = _number(value)
        elif field == 35:
            found.byte_fallback = bool(_number(value))
    if kind not in (_UNIGRAM, _BPE):
        raise ValueError(f"model type {kind}; 1 (unigram) and 2 (BPE) are known")
    found.unigram = kind == _UNIGRAM


def _normalization(found: Vocabulary, raw: bytes) -> None:
    found.remove_extra_whitespaces = True  # the default of an absent field
    for field, value in _fields(raw):
        if field == 2:
            found.charsmap = _bytes(value)
        elif field == 3:
            found.add_dummy_prefix = bool(_number(value))
        elif field == 4:
            found.remove_extra_whitespaces = bool(_number(value))


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield the fields of a protobuf message: number and value, in order."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(raw, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of wire type {kind} at byte {at}")
        if at + length > len(raw):
            raise ValueError(f"a field of {length} bytes at byte {at} of {len(raw)}")
        yield key >> 3, raw[at : at + length]
        at += length


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            raise ValueError("it ends in the middle of a number")
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than ten bytes at byte {at}")


def _bytes(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text belongs")
    return value


def _float(value: bytes) -> float:
    if len(value) != 4:
        raise ValueError(f"{len(value)} bytes where a number of 4 belongs")
    return float(struct.unpack("<f", value)[0])


def _number(value: bytes | int) -> int:
    if not isinstance(value, int):
        raise ValueError("text where a number belongs")
    return value


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return the pairs that become one piece, the best first: SentencePiece merges the neighbours whose union scores
    highest."""
    usable = (Kind.NORMAL, Kind.USER_DEFINED)
    rows = zip(vocabulary.pieces, vocabulary.scores, vocabulary.kinds, strict=True)
    score_of = {piece: score for piece, score, kind in rows if kind in usable}
    own = {piece: piece for piece in score_of}  # pairs of the vocabulary's own strings: large ones have half a million
    found: list[tuple[str, str]] = []
    for piece in sorted(score_of, key=lambda piece: -score_of[piece]):
        for cut in range(1, len(piece) if len(piece) <= _LONGEST_PIECE else 0):
            left = own.get(piece[:cut])
            if left is not None and (right := own.get(piece[cut:])) is not None:
                found.append((left, right))
    return found


def _normalizer(vocabulary: Vocabulary, legacy: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if vocabulary.charsmap:
        steps.append(normalizers.Precompiled(vocabulary.charsmap))
    if vocabulary.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if vocabulary.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
