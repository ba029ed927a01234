"""Grammars of clients, in EBNF or Lark: they accept exactly the language as written, and nothing takes long."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support_grammar import accepts, backend, made
from support_slow import mostly_slow

from tokenmill.errors import GrammarError
from tokenmill.grammar import ebnf
from tokenmill.grammar.base import may_force
from tokenmill.grammar.pool import CompilePool
from tokenmill.wire.messages import GrammarSpec

GUIDANCE = backend()

ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
JSON = r"""
root   ::= object   # comments are allowed
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""
GRAMMARS: list[tuple[str, list[str], list[str]]] = [
    (ARITHMETIC, ["1=2\n", "a+b1*c=3\n", "(1)=2\n\n\na=b\n", "x =\n(y\n)\n"], ["1=2", "=1\n", "1==2\n"]),
    (JSON, ["{}", '{"a": [1, -2.5e3, true, null, "x\\n\\u00e9"]}', '{\n  "é": {"b":[]}}'], ["[]", '{"a":1', "{'a':1}"]),
    ('root ::= item+\nitem ::= "- " [^\\r\\n]+ "\\n"', ["- a\n- é-\n"], ["- \n", "- a", "a\n"]),
    ('root ::= move (" " root)?\nmove ::= [NBKQR]? [a-h] [1-8] [+#]? | "O-O" "-O"?', ["e4 Nf3+ O-O", "O-O-O"], ["e9"]),
    ('root ::= "x" root | [a-z]* "b"', ["ab", "xxb", "xab", "bbb", "b"], ["a", "xa", ""]),
    ('root ::= "(" root ")" | ("ab" | "a") "bc"', ["abc", "(abbc)"], ["ab", "(abc"]),
    ('root ::= "a" "é"* rest\nrest ::= "è" rest | "b"', ["ab", "aéèb", "aèèb", "aééb"], ["aé", "b"]),
    ('root ::= "if" " " name | name "=" root | "0"\nname ::= [a-z]+', ["if=0", "if if", "iff=if x"], ["if", "if0"]),
]  # fmt: skip
CHARACTERS: list[tuple[str, list[str], list[str]]] = [
    ("root ::= .", ["a", "\n", "日"], ["", "ab"]), ("root ::= [^a]", ["b", "\n", "é"], ["a", ""]),
    ("root ::= [a&&b]", ["a", "b", "&"], ["c"]), ("root ::= [a\\-c^]", ["a", "-", "c", "^"], ["b"]),
    ("root ::= [-a] [a-] [a-c-e]", ["--e", "aab"], ["bad"]), ("root ::= [/\\]\\[\\\\]", ["/", "]", "[", "\\"], ["a"]),
    ('root ::= "\\x41\\u00e9\\U0001F600\\t\\"\\\\/"', ['Aé😀\t"\\/'], ["A"]),
    ("root ::= [\\u00e0-\\u00ff]", ["é"], ["z"]),
    ('root ::= "a"{2} "b"{1,2} "c"{2,} "d"{0} "e"{0,1}', ["aabcc", "aabbccce"], ["abcc", "aabc", "aabbccd"]),
    ('root ::= "" | "a"', ["", "a"], ["aa"]), ("root ::= ([ab] | ) [c]?", ["", "a", "bc", "c"], ["ab"]),
    ('a-b_1.x ::= "a"\nroot ::= a-b_1.x "b"', ["ab"], ["a"]), ('root::="a"|\n"b"\n| "c"', ["a", "b", "c"], ["ab"]),
]  # fmt: skip


@pytest.mark.parametrize("text, good, bad", GRAMMARS)
def test_grammars_of_llama_cpp_are_followed(text: str, good: list[str], bad: list[str]) -> None:
    grammar = made(GUIDANCE, "grammar", text)
    assert [one for one in good if not accepts(grammar, one)] == []
    assert [one for one in bad if accepts(grammar, one)] == []


@pytest.mark.parametrize("text, good, bad", CHARACTERS)
def test_characters_are_those_that_were_written(text: str, good: list[str], bad: list[str]) -> None:
    grammar = made(GUIDANCE, "grammar", text)
    assert [one for one in good if not accepts(grammar, one)] == []
    assert [one for one in bad if accepts(grammar, one)] == []


def random_part(depth: int, names: list[str], draw: random.Random) -> str:
    kind = draw.random()
    if depth == 0 or kind < 0.35:
        return draw.choice(['"a"', '"b"', '"ab"', '"abc"', "[ab]", "[^a]", '"c"', "[a-c]", '""', '"ba"'])
    if kind < 0.5:
        return draw.choice(names)
    inner = [random_part(depth - 1, names, draw) for _ in range(draw.randint(2, 3))]
    if kind < 0.68:
        return " ".join(inner)
    if kind < 0.82:
        return f"({' | '.join(inner)})"
    return f"({inner[0]}){draw.choice(['*', '+', '?', '{2}', '{1,2}', '{0,2}', '{2,}'])}"


def language(rules: dict[str, ebnf.Node], most: int) -> set[str]:
    """Return all texts of at most `most` letters a, b, c in the language: the fixed point of the rules."""
    found: dict[str, frozenset[str]] = {name: frozenset() for name in rules}

    def joined(first: frozenset[str], second: frozenset[str]) -> frozenset[str]:
        return frozenset(a + b for a in first for b in second if len(a + b) <= most)

    def texts(node: ebnf.Node) -> frozenset[str]:
        if node.kind == "char":
            return frozenset(letter for letter in "abc" if re.fullmatch(node.text, letter))
        if node.kind == "rule":
            return found[node.text]
        parts = [texts(part) for part in node.parts]
        if node.kind == "any":
            return frozenset().union(*parts)
        out = frozenset([""])
        if node.kind == "all":
            for part in parts:
                out = joined(out, part)
            return out
        for _ in range(node.low):
            out = joined(out, parts[0])
        more = out
        for _ in range(node.low, most + node.low + 1 if node.high is None else node.high):
            more = joined(more, parts[0])
            out |= more
        return out

    while True:
        now = {name: texts(node) for name, node in rules.items()}
        if now == found:
            return set(found[ebnf.ROOT])
        found = now


@pytest.mark.parametrize("part", mostly_slow(range(4), [0]))
def test_random_grammars_have_the_language_that_was_written(part: int) -> None:
    words = ["".join(letters) for size in range(6) for letters in itertools.product("abc", repeat=size)]
    recursive = 0
    for seed in range(25 * part, 25 * part + 25):
        draw = random.Random(seed)
        names = ["root", "x", "y", "z"][: draw.randint(1, 4)]
        text = "\n".join(
            f"{name} ::= " + " | ".join(random_part(3, names, draw) for _ in range(draw.randint(1, 3)))
            for name in names
        )
        wanted = language(ebnf.parse(text), 5)
        try:
            grammar = made(GUIDANCE, "grammar", text)
        except GrammarError:  # no finite text
            assert not wanted, text
            continue
        assert [word for word in words if accepts(grammar, word) != (word in wanted)] == [], text
        recursive += any(not node.regular for node in _marked(text))
    assert recursive > 5


def _marked(text: str) -> Iterator[ebnf.Node]:
    from tokenmill.grammar import lexemes

    rules = ebnf.parse(text)
    lexemes.lark(rules, lambda text: False)
    for rule in rules.values():
        yield from rule.walk()


def test_strings_and_names_are_single_lexemes_for_masks_to_be_fast() -> None:
    from tokenmill.grammar import lexemes

    text = lexemes.lark(ebnf.parse(JSON), GUIDANCE._matches)  # type: ignore[attr-defined]
    assert sum(line.startswith("T") for line in text.splitlines()) == 4  # string, number, true…, ws


@pytest.mark.parametrize("text, why", [
    ('root ::= (\n"a"', "line 2: a group is not closed"), ('root ::= "a" )', "line 1: a rule `name ::= …` is expected"),
    ('root ::= "a"\nb ::= "b"\n\nroot ::= b', "line 4: the rule `root` is there twice"),
    ('root ::= item', "no rule `item`"), ('start ::= "a"', "no rule `root`"), ("root ::= [b-a]", "it begins"),
    ("root ::= []", "no characters"), ('root ::= "a"{3,2}', "ends before"), ('root ::= "a"{20000}', "more than 10000"),
    ('root ::= * "a"', "`*` repeats nothing"), ('root ::= "\\q"', "escape \\q is unknown"), ('root ::= "a', "cannot"),
    ('root ::= "\\ud800"', "no character"), ('root ::= "a"\nb ::= <think>', "line 2: '<think>' cannot be read"),
    ("root ::= " + "(" * 200 + '"a"' + ")" * 200, "more than 100 deep"), ('root ::= "a" root', "never ends"),
    ("start: missing", "missing"),
])  # fmt: skip
def test_what_cannot_be_read_is_told_by_line(text: str, why: str) -> None:
    with pytest.raises(GrammarError) as caught:
        made(GUIDANCE, "grammar", text)
    assert why in str(caught.value)


def test_lark_stays_lark() -> None:
    assert not ebnf.is_ebnf('start: "x ::= y"\n')
    assert accepts(made(GUIDANCE, "grammar", 'start: "x ::= y" A*\nA: /[0-9]/'), "x ::= y12")


def test_hostile_grammars_are_ended_by_the_pool_and_others_go_on() -> None:
    pool = CompilePool(GUIDANCE)
    try:
        pool.submit(GrammarSpec("regex", "warm")).result(60)
        chain = "\n".join(f'r{i} ::= "a" r{i + 1} | "c"' for i in range(3000))
        for text in (
            "root ::= " + "(" * 120_000 + '"a"' + ")" * 120_000, f"{chain}\nr3000 ::= r0\nroot ::= r0",
            'root ::= "x" root | ' + "[a-z]* " * 30_000, "root ::= " + "a ::= " * 40_000,
            "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(5000)) + '\nr5000 ::= "a"\nroot ::= r0',
        ):  # fmt: skip
            began = time.monotonic()
            with pytest.raises(GrammarError):
                pool.submit(GrammarSpec("grammar", text)).result(30)
            assert time.monotonic() - began < 4
            assert accepts(pool.submit(GrammarSpec("regex", "alive")).result(60), "alive")
    finally:
        pool.close()


ENDLESS = """
from support_grammar import backend, made
for text in {texts!r}:
    matcher = made(backend(), "grammar", text).matcher()
    assert matcher.accept(ord("x"))
    assert matcher.forced(10) == []
    assert matcher.accept(ord("a"))
"""


def test_endless_text_without_a_choice_does_not_block() -> None:
    """The library would search for its end for ever."""
    texts = ['start: /[xy]/ A "b"\nA: /ab*/', 'start: /[xy]/ rec\nrec: "a" rec']
    code, here = ENDLESS.format(texts=texts), Path(__file__).parent
    env = {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=env)


def test_long_text_without_choice_is_not_looked_through() -> None:
    text = " ".join(random.Random(0).choices(["river", "stone", "lamp"], k=2_000))
    for kind, source in (
        ("choice", json.dumps([text])), ("json_schema", json.dumps({"const": text})), ("regex", text[:15_000]),
        ("regex", f"({text[:100]}){{99}}"),
    ):  # fmt: skip
        assert not may_force(kind, source)
        matcher = made(GUIDANCE, kind, source).matcher()
        assert matcher.forced(100) == []
        for byte in (b'"' if kind == "json_schema" else b"") + text[:50].encode():
            assert matcher.accept(byte)
    assert may_force("choice", json.dumps([text[i : i + 1000] for i in range(0, 50_000, 1000)]))
    assert may_force("regex", "hello world(, foo){1,9}")
