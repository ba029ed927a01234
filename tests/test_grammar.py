"""Matchers against brute force: a mask allows exactly the accepted tokens, and a rollback restores the state."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from support_grammar import END, OTHER_END, SPECIAL, accepts, allowed, backend, compact, made, small_vocabulary

from tokenmill.errors import GrammarError
from tokenmill.grammar import schema
from tokenmill.grammar.base import Backend, Vocabulary, exact, longest_tokens
from tokenmill.grammar.llguidance import LLGuidance

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"anyOf": [
        {"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["v", "next"], "additionalProperties": False}},
    "$ref": "#/$defs/node",
}  # fmt: skip
LARK = 'start: "foo" pair+ "bar"?\npair: "(" pair* ")"\n'
SPECS = {
    "person": ("json_schema", schema.canonical(PERSON)),
    "tree": ("json_schema", schema.canonical(TREE)),
    "regex": ("regex", "(abc|ab+c?)[0-9]{2,3}é?"),
    "fixed": ("regex", "hello world(, foo)?"),
    "choice": ("choice", json.dumps(["foo", "foobar", "日本", 'a"b\\c/d', "new\nline"], ensure_ascii=False)),
    "lark": ("lark", LARK),
}


@pytest.fixture(scope="module")
def chosen() -> Backend:
    return backend()


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return small_vocabulary()


@pytest.mark.parametrize("name", SPECS)
def test_a_mask_allows_exactly_what_is_accepted(chosen: Backend, vocabulary: Vocabulary, name: str) -> None:
    draw = random.Random(name)
    grammar = made(chosen, *SPECS[name])
    for _ in range(4):
        matcher = grammar.matcher()
        for _ in range(40):
            found = allowed(matcher, vocabulary)
            brute = set()
            for token_id in range(vocabulary.size):
                if matcher.accept(token_id):
                    brute.add(token_id)
                    matcher.rollback(1)
            forced = matcher.forced(1)
            if forced and len(found) == 1:  # of several tokenizations of a forced text, only the tokenizer's is allowed
                assert found == set(forced)
                assert found <= brute
            else:
                assert found == brute
            token_id = draw.choice(sorted(found))
            assert matcher.accept(token_id)
            if token_id in vocabulary.end_ids:
                break


@pytest.mark.parametrize("name", SPECS)
def test_what_is_rolled_back_never_happened(chosen: Backend, vocabulary: Vocabulary, name: str) -> None:
    draw = random.Random(name)
    grammar = made(chosen, *SPECS[name])
    for _ in range(6):
        matcher, ids = grammar.matcher(), []
        states = [(allowed(matcher, vocabulary), matcher.done, matcher.forced(8))]
        while len(ids) < 30 and not (ids and ids[-1] in vocabulary.end_ids):
            ids.append(draw.choice(sorted(states[-1][0])))
            assert matcher.accept(ids[-1])
            states.append((allowed(matcher, vocabulary), matcher.done, matcher.forced(8)))
        while len(states) > 1:
            back = draw.randrange(1, len(states))
            matcher.rollback(back)
            del states[len(states) - back :]
            assert (allowed(matcher, vocabulary), matcher.done, matcher.forced(8)) == states[-1]
            if draw.random() < 0.3 and len(states) < len(ids):
                token_id = ids[len(states) - 1]
                assert matcher.accept(token_id)
                states.append((allowed(matcher, vocabulary), matcher.done, matcher.forced(8)))


@pytest.mark.parametrize("name", SPECS)
def test_matchers_of_one_grammar_do_not_know_each_other(chosen: Backend, vocabulary: Vocabulary, name: str) -> None:
    grammar = made(chosen, *SPECS[name])
    first, second = grammar.matcher(), grammar.matcher()
    start = allowed(second, vocabulary)
    for _ in range(3):
        first.accept(min(allowed(first, vocabulary)))
    assert allowed(second, vocabulary) == start == allowed(grammar.matcher(), vocabulary)


def test_a_token_that_does_not_fit_changes_nothing(chosen: Backend, vocabulary: Vocabulary) -> None:
    matcher = made(chosen, "regex", "ab+").matcher()
    assert matcher.accept(ord("a"))
    before = allowed(matcher, vocabulary)
    for token_id in (ord("c"), END, SPECIAL, 319):
        assert not matcher.accept(token_id)
        assert allowed(matcher, vocabulary) == before
        assert not matcher.failure
    assert matcher.accept(ord("b"))


def test_every_end_token_is_allowed_where_the_grammar_may_end(chosen: Backend, vocabulary: Vocabulary) -> None:
    matcher = made(chosen, "regex", "ab?").matcher()
    assert not {END, OTHER_END} & allowed(matcher, vocabulary)
    matcher.accept(ord("a"))
    assert allowed(matcher, vocabulary) == {ord("b"), END, OTHER_END}
    assert not matcher.done
    matcher.accept(ord("b"))
    assert matcher.done
    assert matcher.forced(5) == []
    for end in (END, OTHER_END):
        assert matcher.accept(end)
        assert matcher.done
        assert not matcher.accept(ord("b"))
        assert allowed(matcher, vocabulary) == {END, OTHER_END}
        matcher.rollback(1)
    matcher.rollback(1)
    assert matcher.accept(OTHER_END)


def test_special_tokens_are_never_text(chosen: Backend, vocabulary: Vocabulary) -> None:
    matcher = made(chosen, "regex", "(abc)+").matcher()
    assert vocabulary.tokens[SPECIAL] == b"abc"
    assert SPECIAL not in allowed(matcher, vocabulary)
    assert not matcher.accept(SPECIAL)


def test_forced_tokens_are_the_only_text_that_may_come(chosen: Backend, vocabulary: Vocabulary) -> None:
    for kind, source, text in (
        ("regex", "hello world(, foo| bar)", b"hello world"), SPECS["person"] + (b"",), ("regex", "a|b", b"")
    ):  # fmt: skip
        matcher = made(chosen, kind, source).matcher()
        forced = matcher.forced(64)
        spelled = b"".join(vocabulary.tokens[i] for i in forced)
        assert text.startswith(spelled)
        assert bool(forced) == bool(text)
        assert forced[:1] == matcher.forced(1)
        for token_id in forced:
            rest = b"".join(vocabulary.tokens[i] for i in forced[forced.index(token_id) :])
            for other in allowed(matcher, vocabulary):
                shorter, longer = sorted((vocabulary.tokens[other], rest + text[len(spelled) :]), key=len)
                assert longer.startswith(shorter)
            assert matcher.accept(token_id)


def test_forced_text_is_cut_as_the_models_tokenizer_cuts_it() -> None:
    vocabulary = small_vocabulary()
    matcher = made(backend(lambda text: list(text)), "regex", "hello world").matcher()
    assert matcher.forced(3) == list(b"hel")
    assert allowed(matcher, vocabulary) == {ord("h")}
    wrong = exact(lambda text: [vocabulary.tokens.index(b"x")], vocabulary)  # a tokenizer that changes the text
    assert wrong(b"hello world") == longest_tokens(vocabulary)(b"hello world")
    assert [vocabulary.tokens[i] for i in wrong(b"hello world")] == [b"hello", b" world"]


@pytest.mark.parametrize("source, forced", [("abc{5}", True), ("äbc{5}", False), (r"\x61bc{5}", False)])
def test_text_is_forced_where_only_bytes_that_it_cannot_have_are_not_spelled(source: str, forced: bool) -> None:
    whole = small_vocabulary()
    tokens = [b"" if text == b"\xf4" else text for text in whole.tokens]
    vocabulary = Vocabulary.of(tokens.__getitem__, len(tokens), whole.size, whole.end_ids, whole.special_ids)
    assert vocabulary.unspelled() == {0xF4}
    chosen = LLGuidance(vocabulary, lambda text: list(text))
    assert bool(made(chosen, "regex", source).matcher().forced(9)) == forced


def test_text_that_no_token_spells_is_not_forced_and_masks_remain_exact() -> None:
    whole = small_vocabulary()
    quote, tokens = ord('"'), whole.tokens
    vocabulary = Vocabulary.of(tokens.__getitem__, len(tokens), whole.size, (quote, END), whole.special_ids)
    assert not whole.unspelled()
    assert vocabulary.unspelled() == {quote}
    chosen, ids = LLGuidance(vocabulary, lambda text: list(text)), whole.tokens.index
    matcher = made(chosen, *SPECS["person"]).matcher()
    for token_id in map(ids, (b'{"', b"name", b'":', b" ", b'":', b'",')):
        found = allowed(matcher, vocabulary)
        assert matcher.forced(9) == []
        assert quote not in found
        for other in found:
            assert matcher.accept(other)
            matcher.rollback(1)
        assert matcher.accept(token_id)


def test_all_rows_are_filled_in_one_call(chosen: Backend, vocabulary: Vocabulary) -> None:
    matchers = [made(chosen, *spec).matcher() for spec in SPECS.values()]
    ended = made(chosen, "regex", "a").matcher()
    for token_id in (ord("a"), OTHER_END):
        ended.accept(token_id)
    matchers.append(ended)
    rows = random.Random(0).sample(range(16), len(matchers))
    mask = np.full((16, vocabulary.mask_words), 0xDEADBEEF, np.uint32)
    chosen.filler(2).fill(list(zip(matchers, rows, strict=True)), mask)
    for matcher, row in zip(matchers, rows, strict=True):
        alone = vocabulary.new_mask(1)
        matcher.fill_mask(alone, 0)
        assert (alone[0] == mask[row]).all()
    assert (mask[[row for row in range(16) if row not in rows]] == 0xDEADBEEF).all()


@pytest.mark.parametrize("name", SPECS)
def test_texts_are_whole_answers_or_not(chosen: Backend, name: str) -> None:
    examples = {
        "person": (['{"name":"é","age":0}', '{"name": "a\'", "age": 12}', '{\n  "name": "",\n  "age": 1\n}'],
                   ['{"name":"abcdefg","age":0}', '{"name":"a","age":-1}', '{"name":"a"}', "{}",
                    '{"name":"a","age":1,"x":1}', '{"name":"a","age":01}', ' {"name":"a","age":1}x']),
        "tree": ([compact({"v": 1, "next": {"v": 2, "next": None}})], [compact({"v": 1, "next": {"v": "2"}})]),
        "regex": (["abc12", "abb123é"], ["abc1", "abc12é3", "a12"]),
        "fixed": (["hello world", "hello world, foo"], ["hello", "hello world,"]),
        "choice": (["foo", "foobar", "日本", 'a"b\\c/d', "new\nline"], ["fo", "foob", ""]),
        "lark": (["foo()", "foo(()())()bar"], ["foo", "foo(", "foo(()bar"]),
    }  # fmt: skip
    grammar = made(chosen, *SPECS[name])
    good, bad = examples[name]
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


def test_what_cannot_be_compiled_says_why(chosen: Backend) -> None:
    for kind, source in (("regex", "(a"), ("regex", r"(?=a)b"), ("lark", "start: missing"), ("nonsense", "x"),
                         ("json_schema", '{"$ref":"#"}')):  # fmt: skip
        with pytest.raises(GrammarError) as caught:
            made(chosen, kind, source)
        assert len(str(caught.value)) > 20


def test_a_limit_met_in_the_middle_ends_its_own_row_alone() -> None:
    chosen, vocabulary = backend(), small_vocabulary()
    costly = made(chosen, "lark", "start: /(a{1,1000}){1,1000}/").matcher()
    good = made(chosen, "regex", "a*").matcher()
    filler, mask = chosen.filler(2), vocabulary.new_mask(2)
    for _ in range(2000):
        filler.fill([(costly, 0), (good, 1)], mask)
        assert good.accept(ord("a"))
        if costly.failure or not costly.accept(ord("a")):
            break
    assert "states" in costly.failure
    filler.fill([(costly, 0), (good, 1)], mask)
    assert np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little")).tolist() == [END, OTHER_END]
    assert costly.done
    assert ord("a") in allowed(good, vocabulary)
    costly.rollback(1)
    assert not costly.failure
