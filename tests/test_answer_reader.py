"""Readers of answers: the scope of stop strings and `min_tokens`, and an answer as one text."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from support_chat import ASKS, CHAT, ids, model_of, planned

from tokenmill.text.answer_reader import WholeText, whole_text
from tokenmill.text.prepare import Prepared


def prepared(stop: str, least: int) -> Prepared:
    return Prepared((1,), None, _Stopping(least), (stop,), None)  # type: ignore[arg-type]


class _Stopping(msgspec.Struct):
    min_new_tokens: int


@pytest.mark.parametrize(("said", "stop", "least", "text"), [
    ("<think>a b</think>a b", "b", 0, "a "),
    ("<think>a b</think>a b", "b", 3, "a b"),
    ("<think>a b</think>a b", "b", 2, "a "),
    ("a b", "b", 0, "a "),
    ("a b", "b", 3, "a b"),
])  # fmt: skip
def test_stop_strings_and_min_tokens_are_about_what_is_behind_the_thought(
    tmp_path: Path, said: str, stop: str, least: int, text: str
) -> None:
    for template in (ASKS, CHAT) if "think" not in said else (ASKS,):
        made = model_of(tmp_path, template)
        detokenizer, router = planned(made).reader.begin(made.tokenizer, prepared(stop, least))
        content = ""
        for token_id in ids(made, said):
            piece = detokenizer.push(token_id)
            content += piece.text if router is None else router.push(piece.text).content
            if piece.stopped or (router is not None and router.over):
                break
        content += detokenizer.finish() if router is None else router.finish().content
        assert content == text


@pytest.mark.parametrize(("said", "stopped", "text"), [
    ("<think>so</think>so it is", None, "so" + "so it is"),
    ("<think>so</think>it is so", "so", "soit is so"),
    ("<think>so</think>aa", "a", "soaa"),
    ("so", "never", "so"),
    ("", None, ""),
])  # fmt: skip
def test_an_answer_as_one_text_ends_with_the_stop_string_of_its_last_token(
    tmp_path: Path, said: str, stopped: str | None, text: str
) -> None:
    made = model_of(tmp_path, ASKS)
    assert whole_text(made.tokenizer, (1,), ids(made, said), stopped) == text


def test_what_follows_a_stop_string_within_its_token_is_cut_off() -> None:
    class Words:  # a tokenizer of whole words
        pieces = None
        special_ids: frozenset[int] = frozenset()
        words = ("", "aa ", "so so!")

        def token_text(self, token_id: int) -> str:
            return self.words[token_id]

        def decode(self, token_ids: list[int], skip: bool) -> str:
            return "".join(self.words[i] for i in token_ids)

    for stopped, text in (("so", "aa so"), (" s", "aa s"), ("!", "aa so so!"), ("a s", "aa s"), ("x", "aa so so!")):
        assert whole_text(Words(), (), (1, 2), stopped) == text  # type: ignore[arg-type]


@pytest.mark.parametrize(("stop", "stopped_at", "expected"), [
    ((), None, ["a", " ", "b", " ", "c"]),
    (("b c",), 4, ["", "", "a", " ", ""]),
    (("zzzz",), None, ["", "", "", "a", " ", "b c"]),
    (("c", "b "), 3, ["", "a", " ", ""]),
    (("never",), 2, ["", "", "a b"]),
])  # fmt: skip
def test_a_whole_text_is_shown_up_to_where_a_stop_string_may_begin(
    tmp_path: Path, stop: tuple[str, ...], stopped_at: int | None, expected: list[str]
) -> None:
    made = model_of(tmp_path, ASKS)
    whole = WholeText(made.tokenizer, (1,), stop)
    pieces = []
    for i, token_id in enumerate(ids(made, "a b c")):
        pieces.append(whole.push(token_id, stop[-1] if i == stopped_at else None))
        if i == stopped_at:
            break
    rest = whole.finish()
    assert pieces + ([rest] if rest else []) == expected


def test_a_thought_is_shown_at_once(tmp_path: Path) -> None:
    made = model_of(tmp_path, ASKS)
    whole = WholeText(made.tokenizer, (1,), ("a long stop string",))
    shown = [whole.push(token_id, in_reasoning=True) for token_id in ids(made, "a b")]
    assert "".join(shown) == "a b"
