"""Regular expressions: they mean the same as in Python, or are refused with the name of the unsupported part."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_grammar import accepts, backend, made

from tokenmill.errors import GrammarError
from tokenmill.grammar import schema
from tokenmill.grammar.base import Backend, Vocabulary
from tokenmill.grammar.llguidance import LLGuidance
from tokenmill.grammar.patterns import PatternError, literal, rewrite

GUIDANCE = backend()


@pytest.fixture
def guidance() -> Backend:
    return GUIDANCE


PATTERNS = [
    (r"^a$|^b$", ["a", "b"], ["ab", "c", ""]), (r"\d{3}-\d{4}", ["123-4567"], ["123-456", "٣٣٣-1234"]),
    (r"(?P<year>\d\d)/(?:x|y)?", ["24/", "24/x"], ["2/", "24/xy"]), (r"[\w.+-]+@x", ["a.b+c-d@x", "é@x"], ["@x"]),
    (r"[^\]]*", ["abc["], ["a]"]), (r"a{}b", ["a{}b"], ["ab"]), (r"(?i)abc", ["ABC", "aBc"], ["abd"]),
    (r"\x41\u00e9\t", ["Aé\t"], ["A"]), (r"[a-c&&b]", ["&", "a"], ["d"]), (r"\$\.\/#", ["$./#"], ["$x/#"]),
    (r"a+?b*?", ["a", "aab"], ["b"]), (r"\p{Lu}x", ["Éx"], ["éx"]), (r"", [""], ["a"]),
]  # fmt: skip


@pytest.mark.parametrize("pattern, good, bad", PATTERNS)
def test_regular_expressions_match_the_whole_text(guidance: Backend, pattern: str, good: Any, bad: Any) -> None:
    grammar = made(guidance, "regex", pattern)
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


def pieces() -> st.SearchStrategy[str]:
    """Return patterns made of small parts, most of them well formed."""
    one = st.sampled_from(["a", "b", "-", "]", "}", "{", ".", "\\d", "\\w", "\\s", "\\.", "\\-", "\\/", "\\x41", "é",
                           "[ab]", "[^a]", "[a-c-]", "[\\d.]", "[[&~|]", "[\\]\\\\]", "(?i)", "^", "$", "~", " ",
                           "&&", "#"])  # fmt: skip
    counts = st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,2}", "*?"])
    return st.recursive(one, lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join), st.tuples(inner, inner).map("|".join), inner.map("({})".format),
        inner.map("(?:{})".format), st.tuples(inner, counts).map("".join),
    ), max_leaves=6)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(pieces(), st.lists(st.text("ab-]}{.1_ é&#[|A/~", max_size=5), max_size=12))
def test_patterns_mean_what_python_takes_them_for(pattern: str, texts: list[str]) -> None:
    try:
        grammar = made(GUIDANCE, "regex", pattern)
    except GrammarError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled = re.compile(pattern)
        except re.error:  # of another dialect
            return
    for text in texts:
        assert accepts(grammar, text) == bool(compiled.fullmatch(text)), (pattern, text)


@pytest.mark.parametrize("pattern, name", [
    ("(?=a)b", "lookahead"), ("(?<!a)b", "lookbehind"), (r"(a)\1", "backreference"), (r"\bx", "word boundary"),
    ("(a{1,1000}){1,1000}", "repetitions"), ("a^b", "middle"), ("(a", "closed"), ("a)", "nothing"), ("*a", "nothing"),
    ("[b-a]", "range"), ("[]a]", "empty"), ("a{,3}", "{0,n}"), ("a{3,1}", "ends before"), ("a++", "possessive"),
    (r"\q", "unknown"), ("a\\", "backslash"), ("[a", "closed"), ("(?>a)", "atomic"), ("(?x)a", "not supported"),
    ("(" * 300 + ")" * 300, "deep"), ("a" * 20_000, "characters"), (r"\u{110000}", "no character"),
    (r"\ud800", "surrogate"),
])  # fmt: skip
def test_patterns_that_no_automaton_serves_are_refused_by_name(pattern: str, name: str) -> None:
    for search in (True, False):
        if not (search and name == "middle"):
            with pytest.raises(PatternError, match=name.replace("{", r"\{")):
                rewrite(pattern, search)


@pytest.mark.parametrize("pattern", ["(.{0,90}a){90}", "(.{0,50}[ab]){1,80}c"])
def test_patterns_with_too_many_states_are_refused_before_a_token_is_spent(pattern: str) -> None:
    words = ["".join(letters).encode() for size in (3, 5) for letters in itertools.product("abxy", repeat=size)]
    tokens = (*(bytes([i]) for i in range(256)), *words, b"<e>")
    end = (len(tokens) - 1,)
    wide = LLGuidance(Vocabulary(tokens, end, end, len(tokens)))
    for kind, source in (("regex", pattern), ("json_schema", schema.canonical({"type": "string", "pattern": pattern}))):
        with pytest.raises(GrammarError, match="too many states"):
            wide.prepare(kind, source)


def test_literals_match_themselves_alone(guidance: Backend) -> None:
    texts = ["a.b*c", "\\d[x]{2}^$|()?+", "é\n\t/ #&~-", "\x00\x1f\x7f", "a"]
    for text in texts:
        grammar = made(guidance, "regex", literal(text)) if "\x00" not in text else None
        if grammar is not None:
            assert [other for other in texts if accepts(grammar, other)] == [text]
    choices = made(guidance, "choice", json.dumps(texts))
    assert all(accepts(choices, text) for text in texts)
