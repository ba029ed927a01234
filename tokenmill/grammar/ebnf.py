"""Parser for EBNF in the dialects of llama.cpp (GBNF) and xgrammar: `root ::= "a" [b-z]* | other{2,3}`.

White space, including newlines, only separates. Lookaheads, macros and tokens (`<…>`) are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from tokenmill.errors import GrammarError

MAX_DEPTH = 100
MAX_COUNT = 10_000
ROOT = "root"
ANY = "(?s:.)"
"""The regular expression of any character."""

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*"
_RULE = re.compile(rf"(?m)^[ \t]*{_NAME}[ \t]*::=")
_TOKEN = re.compile(
    rf"(?P<space>\s+|\#[^\n]*)|(?P<rule>{_NAME})[ \t]*::=|(?P<name>{_NAME})|\"(?P<text>(?:[^\"\\]|\\.)*)\""
    r"|\[(?P<chars>(?:[^\]\\]|\\.)*)\]|\{[ \t]*(?P<low>\d{1,9})[ \t]*(?P<comma>,)?[ \t]*(?P<high>\d{1,9})?[ \t]*\}"
    r"|(?P<mark>[.()|*+?])",
    re.DOTALL,
)
_CHAR = re.compile(r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\(.)|(.)", re.DOTALL)
_ESCAPES = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "a": 7, "b": 8, "e": 27, "0": 0}
_COUNTS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


@dataclass(eq=False, slots=True)
class Node:
    """A part of a rule.

    `kind`: "char" (one character; `text` is its regular expression), "rule" (a reference; `text` is the rule's name),
    "all" (the parts in order), "any" (one of the parts), "repeat" (the only part, `low` to `high` times).
    """

    kind: str
    text: str = ""
    parts: Sequence[Node] = ()
    low: int = 0
    high: int | None = None  # None: any number of times
    wide: bool = False  # a character that may be outside of ASCII
    regular: bool = False  # not recursive; set by `lexemes.py`

    def walk(self) -> Iterator[Node]:
        """Yield all nodes, children before parents."""
        for part in self.parts:
            yield from part.walk()
        yield self


def is_ebnf(text: str) -> bool:
    """Return whether a grammar contains an EBNF rule."""
    return _RULE.search(text) is not None


def parse(text: str) -> dict[str, Node]:
    """Parse into rules by name. `root` and all rules that are referred to exist. Raises GrammarError with the line."""
    return _Parser(text).rules()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._next: re.Match[str] | None = None
        self._advance()

    def rules(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        while self._next is not None:
            name = self._next["rule"]
            if name is None:
                self._refuse("a rule `name ::= …` is expected")
            if name in rules:
                self._refuse(f"the rule `{name}` is there twice")
            self._advance()
            rules[name] = self._choice(0)
        for name in [ROOT, *(node.text for rule in rules.values() for node in rule.walk() if node.kind == "rule")]:
            if name not in rules:
                raise GrammarError(f"The grammar cannot be used: it has no rule `{name}`.")
        return rules

    def _choice(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            self._refuse(f"groups are nested more than {MAX_DEPTH} deep")
        parts = [self._sequence(depth)]
        while self._next is not None and self._next["mark"] == "|":
            self._advance()
            parts.append(self._sequence(depth))
        return parts[0] if len(parts) == 1 else Node("any", parts=parts)

    def _sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while (part := self._item(depth)) is not None:
            counts = self._counts()
            parts.append(part if counts is None else Node("repeat", parts=[part], low=counts[0], high=counts[1]))
        return parts[0] if len(parts) == 1 else Node("all", parts=parts)

    def _item(self, depth: int) -> Node | None:
        found = self._next
        if found is None or found["rule"] or found["mark"] in ("|", ")"):
            return None
        if found["name"] is not None:
            node = Node("rule", found["name"])
        elif found["text"] is not None:
            node = self._literal(found["text"])
        elif found["chars"] is not None:
            node = self._class(found["chars"])
        elif found["mark"] == ".":
            node = Node("char", ANY, wide=True)
        elif found["mark"] == "(":
            self._advance()
            node = self._choice(depth + 1)
            if self._next is None or self._next["mark"] != ")":
                self._refuse("a group is not closed")
        else:
            self._refuse(f"`{found[0]}` repeats nothing")
        self._advance()
        return node

    def _counts(self) -> tuple[int, int | None] | None:
        found = self._next
        if found is None or (found["low"] is None and found["mark"] not in _COUNTS):
            return None
        if found["low"] is None:
            low, high = _COUNTS[found["mark"]]
        else:
            low, high = int(found["low"]), int(found["high"]) if found["high"] else None
            high = high if found["comma"] else low
            if max(low, high or 0) > MAX_COUNT:
                self._refuse(f"a part is repeated more than {MAX_COUNT} times")
            if high is not None and high < low:
                self._refuse(f"the repetition {found[0]} ends before it begins")
        self._advance()
        return low, high

    def _literal(self, text: str) -> Node:
        codes = map(self._code, _CHAR.finditer(text))
        chars = [Node("char", _one(code), wide=code > 0x7F) for code in codes]
        return chars[0] if len(chars) == 1 else Node("all", parts=chars)

    def _class(self, text: str) -> Node:
        negated = text.startswith("^")
        members = list(_CHAR.finditer(text, 1 if negated else 0))
        out, wide, at = "", negated, 0
        while at < len(members):
            first = last = self._code(members[at])
            if at + 2 < len(members) and members[at + 1][0] == "-":
                last = self._code(members[at + 2])
                at += 2
            if last < first:
                self._refuse(f"a range in [{text[:40]}] ends before it begins")
            out += _one(first) if first == last else f"{_one(first)}-{_one(last)}"
            wide |= last > 0x7F
            at += 1
        if not out and not negated:
            self._refuse("a class [] has no characters")
        return Node("char", f"[{'^' * negated}{out}]" if out else ANY, wide=wide)

    def _code(self, found: re.Match[str]) -> int:
        digits = found[1] or found[2] or found[3]
        if digits is not None:
            code = int(digits, 16)
        elif found[4] is None:
            code = ord(found[5])
        elif found[4] in _ESCAPES:
            code = _ESCAPES[found[4]]
        elif found[4].isalnum():
            self._refuse(f"the escape \\{found[4]} is unknown")
        else:
            code = ord(found[4])
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            self._refuse(f"{found[0]} is no character")
        return code

    def _advance(self) -> None:
        while self._at < len(self._text):
            self._next = _TOKEN.match(self._text, self._at)
            if self._next is None:
                self._refuse(f"{self._text[self._at : self._at + 20]!r} cannot be read")
            self._at = self._next.end()
            if not self._next["space"]:
                return
        self._next = None

    def _refuse(self, why: str) -> NoReturn:
        at = self._at if self._next is None else self._next.start()
        raise GrammarError(f"The grammar cannot be used: line {self._text.count(chr(10), 0, at) + 1}: {why}.")


def _one(code: int) -> str:
    """Return the regular expression of one character, valid inside a class too."""
    return chr(code) if chr(code).isalnum() and code < 0x80 else f"\\x{{{code:X}}}"
