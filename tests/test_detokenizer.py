from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support_text import byte_level, recorded, sentencepiece_model
from tokenizers import decoders

from tokenmill.text import sentencepiece
from tokenmill.text.detokenizer import Detokenizer, StopMatcher
from tokenmill.text.tokenizer import Tokenizer

BYTES = Tokenizer(byte_level())
PIECES = Tokenizer(sentencepiece.build(sentencepiece.parse(sentencepiece_model("bpe_identity"))))
WORDS = "the licensed work 🙂 日本語 naïve — of others\n\n\tא  ½<|im_end|>".split(" ")

byte_ids = st.lists(st.integers(0, BYTES.vocab_size + 3), max_size=60)  # a few ids that the vocabulary lacks
texts = st.lists(st.sampled_from([*WORDS, " "]), max_size=20).map(" ".join)


def run(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = (), **more: Any) -> tuple[str, str, str | None]:
    """Return the answer, the texts of its tokens, and the stop string."""
    decoder, out, own = Detokenizer(tokenizer, stop, **more), "", ""
    for token_id in ids:
        piece = decoder.push(token_id)
        out += piece.text
        own += piece.token_text
        assert decoder.text == out
        if piece.stopped is not None:
            return out, own, piece.stopped
    out += decoder.finish()
    assert decoder.text == out
    return out, own, None


def is_all_but_half_a_character(text: str, everything: str) -> bool:
    """True if `text` is `everything`, or lacks only the beginning of a character at the end."""
    return everything.startswith(text) and set(everything[len(text) :]) <= {"\ufffd"}


@settings(max_examples=150, deadline=None)
@given(byte_ids)
def test_the_pieces_of_random_tokens_join_to_one_decoding(ids: list[int]) -> None:
    raw = b"".join(BYTES.token_bytes(i) for i in ids)
    everything = BYTES.decode([i for i in ids if i < BYTES.vocab_size], skip_special_tokens=False)
    assert everything == raw.decode(errors="replace")
    shown, own, _ = run(BYTES, ids, skip_special_tokens=False)
    assert shown == own
    assert is_all_but_half_a_character(own, everything)


@settings(max_examples=100, deadline=None)
@given(texts, st.sampled_from([BYTES, PIECES]))
def test_a_text_comes_back_as_it_was_and_every_piece_is_whole(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoder = Detokenizer(tokenizer, skip_special_tokens=False)
    pieces = [decoder.push(i).text for i in ids]
    assert "\ufffd" not in "".join(pieces)
    joined = "".join(pieces) + decoder.finish()
    assert joined == (text if tokenizer is BYTES or not text else " " + text)  # a continuation keeps its first space


@settings(max_examples=100, deadline=None)
@given(byte_ids.map(lambda ids: [i for i in ids if i < BYTES.vocab_size]), st.integers(0, 60))
def test_what_follows_a_prompt_is_the_rest_of_decoding_both(ids: list[int], cut: int) -> None:
    prompt, rest = ids[:cut], ids[cut:]
    raw = b"".join(BYTES.token_bytes(i) for i in prompt)
    try:
        raw.decode()
    except UnicodeDecodeError:
        return  # the border is inside a character: the two decodings are of different texts
    _, own, _ = run(BYTES, rest, skip_special_tokens=False)
    before = BYTES.decode(prompt, skip_special_tokens=False)
    assert BYTES.decode(ids, skip_special_tokens=False)[len(before) :].startswith(own)


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, str, str | None]:
    """Return the text before the first stop string, and with it, by a search character by character."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], text[:end], stop
    return text, text, None


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab🙂", max_size=30),
    st.lists(st.integers(1, 7), max_size=30),
    st.lists(st.text("ab🙂", min_size=1, max_size=6), min_size=1, max_size=4),
    st.booleans(),
)
def test_a_stop_string_is_found_wherever_the_text_is_cut(
    text: str, cuts: list[int], stops: list[str], include: bool
) -> None:
    matcher, at, out, stopped = StopMatcher(stops), 0, "", None
    for cut in [*cuts, len(text)]:
        emitted, stopped = matcher.push(text[at : at + cut], True, include)
        out += emitted
        at += cut
        if stopped is not None:
            break
    out += matcher.finish()
    before, with_it, stop = first_stop(text, stops)
    assert (out, stopped) == (with_it if include else before, stop)


@settings(max_examples=120, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
       st.lists(st.integers(1, 4), max_size=12), st.integers(0, 12), st.booleans())  # fmt: skip
def test_a_stop_string_ends_nothing_before_the_least_number_of_tokens(
    text: str, stops: list[str], cuts: list[int], early: int, include: bool
) -> None:
    places = [0, *(sum(cuts[: i + 1]) for i in range(len(cuts))), len(text)]
    pieces = [text[a:b] for a, b in pairwise(place for place in places if place <= len(text)) if a < b]
    matcher, out, stopped = StopMatcher(stops), "", None
    for i, piece in enumerate(pieces):
        emitted, stopped = matcher.push(piece, True, include, ends=i >= early)
        out += emitted
        if stopped is not None:
            break
    least = len("".join(pieces[:early]))
    found = [
        (start + len(stop), start, stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > least
    ]
    end, start, stop = min(found, default=(len(text), len(text), None))
    assert (out + matcher.finish(), stopped) == (text[: end if include else start], stop)


def test_a_stop_string_that_is_complete_too_early_stays_in_the_text() -> None:
    ids = [BYTES.encode(letter)[0] for letter in "ababab"]
    for least, out in ((0, "a"), (1, "a"), (2, "aba"), (3, "aba"), (4, "ababa"), (40, "ababab")):
        assert run(BYTES, ids, ["b"], min_tokens=least)[0] == out, least


def test_nothing_is_held_back_that_can_be_part_of_no_stop_string() -> None:
    matcher = StopMatcher(["STOP", "\n\n"])
    assert matcher.push("hello\n", True, False) == ("hello", None)
    assert matcher.push("world S", True, False) == ("\nworld ", None)
    assert matcher.push("TO", True, False) == ("", None)
    assert matcher.push("RY", True, False) == ("STORY", None)
    assert matcher.push("\n", True, False) == ("", None)
    assert matcher.finish() == "\n"


def test_special_tokens_are_left_out_but_can_stop() -> None:
    ids = [*BYTES.encode("one "), 2, *BYTES.encode("two")]
    assert run(BYTES, ids) == ("one two", "one <|im_end|>two", None)
    assert run(BYTES, ids, skip_special_tokens=False)[0] == "one <|im_end|>two"
    assert run(BYTES, ids, ["<|im_end|>"]) == ("one ", "one <|im_end|>", "<|im_end|>")
    assert run(BYTES, ids, ["im_en"], include_stop=True)[0] == "one "
    assert run(BYTES, ids, [">two"], include_stop=True)[0] == "one two"
    assert Detokenizer(BYTES).push(2).special


def test_after_a_stop_nothing_more_comes() -> None:
    decoder = Detokenizer(BYTES, ["b"])
    (a, b, c) = [BYTES.encode(letter)[0] for letter in "abc"]
    assert [decoder.push(i).text for i in (a, b, c)] == ["a", "", ""]
    assert (decoder.finish(), decoder.text) == ("", "a")


def test_a_character_that_never_ends_is_left_out_and_a_broken_one_is_shown() -> None:
    first = BYTES.token_id("ð")  # the byte that begins a character of four
    assert first is not None
    face = BYTES.encode("🙂")
    assert run(BYTES, [*BYTES.encode("ok"), *face[:-1]]) == ("ok", "ok", None)
    assert run(BYTES, [first, *BYTES.encode("a")])[0] == "\ufffda"
    decoder = Detokenizer(BYTES)
    assert [decoder.push(i).token_text for i in face] == [""] * (len(face) - 1) + ["🙂"]


@pytest.mark.parametrize("prompt", ["", "the work"])
def test_a_decoder_without_a_table_gives_the_same_text(prompt: str) -> None:
    inner = byte_level()
    inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\x00", "")])
    slow = Tokenizer(inner)
    assert slow.pieces is None
    for text in ("the licensed work 🙂 日本語 naïve", "½<|im_end|>א" * 9, "🙂" * 20):
        ids, prompt_ids = BYTES.encode(text), BYTES.encode(prompt)
        decoder = Detokenizer(slow, skip_special_tokens=False, prompt_ids=prompt_ids)
        assert "".join(decoder.push(i).text for i in ids) + decoder.finish() == text


def test_words_without_marks_get_their_spaces_from_the_words_before() -> None:
    vocabulary = {"hello": 0, "wor": 1, "##ld": 2, "again": 3}
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary))
    inner.decoder = decoders.WordPiece()
    decoder = Detokenizer(Tokenizer(inner), prompt_ids=[0])
    assert [decoder.push(i).text for i in (1, 2, 3)] == [" wor", "ld", " again"]


def family(name: str) -> Tokenizer:
    """Return a tokenizer with each kind of decoder in use. All of them have bytes, words and special tokens."""
    if name in SENTENCEPIECE:
        return Tokenizer(sentencepiece.build(sentencepiece.parse(sentencepiece_model(name))))
    inner = byte_level()
    if name == "bytes, then more":
        inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\x00", "")])
    elif name != "bytes":
        pieces = [
            "▁the",
            "▁▁",
            "▁",
            "work",
            "##ing",
            "##s",
            "end</w>",
            ".",
            "'s",
            "n't",
            "日本",
            "</w>",
            "Ġ",
            "|",
            "<s>",
        ]
        model = tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
        inner = tokenizers.Tokenizer(model)
        inner.add_special_tokens(["<s>"])
        inner.decoder = {
            "metaspace": decoders.Metaspace(),
            "metaspace, never before the first": decoders.Metaspace(prepend_scheme="never"),
            "word pieces": decoders.WordPiece(),
            "word pieces as they are": decoders.WordPiece(cleanup=False),
            "ends of words": decoders.BPEDecoder(),
            "ctc": decoders.CTC(pad_token="<s>", cleanup=False),
            "fused": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
            "stripped one by one": decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),
        }.get(name)
    return Tokenizer(inner)


SENTENCEPIECE = sorted(recorded("sentencepiece.json")["models"])
FAMILIES = {
    name: family(name)
    for name in [
        *SENTENCEPIECE, "bytes", "bytes, then more", "metaspace", "metaspace, never before the first", "word pieces",
        "word pieces as they are", "ends of words", "ctc", "fused", "stripped one by one", "none",
    ]
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_in_every_family_the_stream_is_the_rest_of_one_decoding(name: str, data: st.DataObject) -> None:
    tokenizer = FAMILIES[name]
    usual = st.integers(0, tokenizer.vocab_size - 1)
    few = st.sampled_from(data.draw(st.lists(usual, min_size=1, max_size=4)))  # repeats, runs of halves
    prompt = [p for p in data.draw(st.lists(usual, min_size=1, max_size=12)) if p not in tokenizer.special_ids]
    rest = data.draw(st.lists(usual | few, max_size=60))
    for skip in (False, True):
        before = tokenizer.decode(prompt, skip)
        if not prompt or before.endswith("\ufffd\ufffd"):
            return  # bytes that are broken may be counted in either way
        out, own, _ = run(tokenizer, rest, skip_special_tokens=skip, prompt_ids=prompt)
        everything, before = tokenizer.decode(prompt + rest, skip), before.removesuffix("\ufffd")
        assert everything.startswith(before)
        rest_of_it = everything[len(before) :]
        assert is_all_but_half_a_character(out, rest_of_it) or is_all_but_half_a_character("\ufffd" + out, rest_of_it)
        assert skip or own == out


def test_a_character_that_begins_in_the_prompt_is_shown_whole() -> None:
    face = BYTES.encode("🙂")
    prompt = BYTES.encode("the work ")
    for cut in range(1, len(face)):
        assert run(BYTES, [*face[cut:], *BYTES.encode("!")], prompt_ids=prompt + face[:cut])[0] == "🙂!"
        assert run(FAMILIES["bytes, then more"], face[cut:], prompt_ids=prompt + face[:cut])[0] == "🙂"
    assert run(BYTES, face, prompt_ids=prompt)[0] == "🙂"


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_in_every_family_stop_strings_cut_what_one_decoding_gives(name: str, data: st.DataObject) -> None:
    tokenizer = FAMILIES[name]
    usual = st.integers(0, tokenizer.vocab_size - 1).filter(lambda i: i not in tokenizer.special_ids)
    rest = data.draw(st.lists(usual, min_size=1, max_size=30))
    whole, _, _ = run(tokenizer, rest, prompt_ids=[rest[0]])
    if not whole:
        return
    start = data.draw(st.integers(0, len(whole) - 1))
    stops = [whole[start : start + data.draw(st.integers(1, 9))], "never there"]
    before, with_it, stop = first_stop(whole, stops)
    assert run(tokenizer, rest, stops, prompt_ids=[rest[0]])[::2] == (before, stop)
    assert run(tokenizer, rest, stops, prompt_ids=[rest[0]], include_stop=True)[::2] == (with_it, stop)
    assert stop is not None
