"""Translation of regular expressions (ECMA-262, Python) into the dialect that the grammar library reads (Rust's).

Constructs that the dialects read differently are rewritten. Constructs that no automaton can match, or that are
ambiguous, are refused by name. `search` patterns are JSON Schema's: they match anywhere in a string, and their `\\w`
and `\\d` are ASCII. Other patterns match a whole text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_PATTERN_CHARS = 16_384
MAX_LOOKAHEADS = 16
MAX_REPETITION = 10_000
"""The largest product of nested counted repetitions: (a{100}){100} is 10,000."""

_META = frozenset("\\.+*?()|[]{}^$#&-~")
_NAMED = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B}
_HAS_ESCAPE_LETTER = frozenset((0x08, 0x09, 0x0A, 0x0C, 0x0D))  # JSON writes other control characters as \u00XX
_COUNT = re.compile(r"\{(\d{1,6})(,(\d{0,6}))?\}")
_GROUP_NAME = re.compile(r"\?P?<[A-Za-z_$][A-Za-z0-9_$]*>")
_FLAGS = re.compile(r"\?([is]*)(-[is]+)?([:)])")
_HEX = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}")
_PROPERTY = re.compile(r"[pP]\{[A-Za-z0-9_=&]+\}|[pP][A-Z]")
_ECMA_DOT = "[^\\x0A\\x0D\u2028\u2029]"
_REFUSED_GROUPS = (
    ("?=", "a lookahead (?=…)"), ("?!", "a lookahead (?!…)"), ("?<=", "a lookbehind (?<=…)"),
    ("?<!", "a lookbehind (?<!…)"), ("?P=", "a backreference (?P=…)"), ("?>", "an atomic group (?>…)"),
    ("?#", "a comment (?#…)"), ("?(", "a condition (?(…)…)"),
)  # fmt: skip


class PatternError(ValueError):
    """An unsupported pattern; the message is the reason, without the pattern."""


class Pattern(NamedTuple):
    """A rewritten pattern. `controls`: it contains control characters for which JSON has no escape letter."""

    text: str
    controls: bool


def rewrite(pattern: str, search: bool) -> Pattern:
    """Translate the pattern into Rust's dialect. Raises PatternError, which names the unsupported construct."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise PatternError(f"it has {len(pattern)} characters; at most {MAX_PATTERN_CHARS} are allowed")
    scanner = _Scanner(pattern, search)
    return Pattern(scanner.run(), scanner.controls)


def conjuncts(pattern: str) -> list[str]:
    """Split a search pattern into patterns that together mean the same: `^(?=a)b` is `^a` and `^b`."""
    found: list[str] = []
    rest = pattern if len(pattern) <= MAX_PATTERN_CHARS else ""
    while rest.startswith("^(?=") and len(found) < MAX_LOOKAHEADS:
        end = _end_of_group(rest, 1)
        if end < 0 or _has_branches(rest[end:]):
            return [pattern]
        found.append(f"^(?:{rest[4 : end - 1]})")
        rest = "^" + rest[end:]
    return [*found, rest] if found else [pattern]


_LEVELS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|([()|])", re.DOTALL)


def _end_of_group(text: str, at: int) -> int:
    """Return the position after the parenthesis that closes the one at `at`; -1 if none does."""
    depth = 0
    for found in _LEVELS.finditer(text, at):
        depth += {"(": 1, ")": -1}.get(found[1], 0)
        if depth == 0:
            return found.end()
    return -1


def _has_branches(text: str) -> bool:
    """Return whether there is an alternative outside of all groups."""
    depth = 0
    for found in _LEVELS.finditer(text):
        depth += {"(": 1, ")": -1}.get(found[1], 0)
        if found[1] == "|" and depth == 0:
            return True
    return False


def literal(text: str) -> str:
    """Return a pattern that matches exactly `text`."""
    return "".join(map(_char, map(ord, text)))


def _char(code: int) -> str:
    if code < 0x20 or code == 0x7F or code == ord("/"):
        return f"\\x{code:02X}"
    return "\\" + chr(code) if chr(code) in _META else chr(code)


class _Scanner:
    def __init__(self, pattern: str, search: bool) -> None:
        self.controls = False
        self._text, self._search = pattern, search
        self._at = 0
        self._out: list[str] = []
        self._heaviest = [1]  # per open group: the largest product of repetitions inside
        self._atom = 0  # weight of the atom that a quantifier would repeat; 0: there is none
        self._starts = True  # at the start of a branch outside of all groups

    def run(self) -> str:
        while self._at < len(self._text):
            character = self._text[self._at]
            handler = _HANDLERS.get(character)
            if handler is None:
                self._at += 1
                self._one(_char(self._code(ord(character))))
            else:
                handler(self)
        if len(self._heaviest) > 1:
            raise PatternError("a group is not closed")
        return "".join(self._out)

    def _one(self, text: str, weight: int = 1) -> None:
        self._out.append(text)
        self._atom, self._starts = weight, False

    def _code(self, code: int) -> int:
        if code < 0x20 and code not in _HAS_ESCAPE_LETTER:
            self.controls = True
        if 0xD800 <= code < 0xE000:
            raise PatternError("it has half of a surrogate pair")
        return code

    def _dot(self) -> None:
        self._at += 1
        self._one(_ECMA_DOT if self._search and "(?s" not in self._text else ".")

    def _anchor(self) -> None:
        character = self._text[self._at]
        self._at += 1
        if self._search:
            self._out.append(character)
            return
        outside = len(self._heaviest) == 1
        ends = self._at == len(self._text) or self._text[self._at] == "|"
        if not outside or not (self._starts if character == "^" else ends):
            raise PatternError(f"{character!r} in the middle (a regex matches the whole text)")
        self._atom = 0

    def _branch(self) -> None:
        self._at += 1
        self._out.append("|")
        self._atom, self._starts = 0, len(self._heaviest) == 1

    def _open(self) -> None:
        rest = self._text[self._at + 1 :]
        for beginning, name in _REFUSED_GROUPS:
            if rest.startswith(beginning):
                raise PatternError(f"{name} is not supported")
        head = "("
        if rest.startswith("?"):
            named, flags = _GROUP_NAME.match(rest), _FLAGS.match(rest)
            if named is None and flags is None:
                raise PatternError(f"the group ({rest[:3]}…) is not supported")
            found = named or flags
            assert found is not None
            self._at += found.end()
            if flags is not None:
                head = "(" + flags[0]
                if flags[3] == ")":
                    self._at += 1
                    self._out.append(head)
                    return
        self._at += 1
        self._out.append(head)
        if len(self._heaviest) > 200:
            raise PatternError("its groups are nested more than 200 deep")
        self._heaviest.append(1)
        self._atom, self._starts = 0, False

    def _close(self) -> None:
        if len(self._heaviest) == 1:
            raise PatternError("a ')' closes nothing")
        self._at += 1
        weight = self._heaviest.pop()
        self._one(")", weight)
        self._weigh(weight)

    def _weigh(self, weight: int) -> None:
        if weight > MAX_REPETITION:
            raise PatternError(f"its nested repetitions multiply to more than {MAX_REPETITION}")
        self._heaviest[-1] = max(self._heaviest[-1], weight)

    def _repeat(self) -> None:
        if not self._atom:
            raise PatternError(f"{self._text[self._at]!r} repeats nothing")
        self._at += 1
        self._out.append(self._text[self._at - 1])
        self._lazy()

    def _lazy(self) -> None:
        following = self._text[self._at : self._at + 1]
        if following == "?":  # a lazy quantifier matches the same texts
            self._at += 1
        elif following == "+":
            raise PatternError("a possessive repetition is not supported")

    def _brace(self) -> None:
        found = _COUNT.match(self._text, self._at)
        if found is None:
            if re.match(r"\{,\d*\}", self._text[self._at : self._at + 9]):
                raise PatternError("{,n} is read in two ways; write {0,n}")
            self._at += 1
            self._one(r"\{")
            return
        if not self._atom:
            raise PatternError(f"{found[0]!r} repeats nothing")
        low, high = int(found[1]), int(found[3]) if found[3] else 0
        if high and high < low:
            raise PatternError(f"the repetition {found[0]} ends before it begins")
        self._atom *= max(low, high, 1)
        self._weigh(self._atom)
        self._at = found.end()
        self._out.append(found[0])
        self._lazy()

    def _escape(self) -> None:
        self._at += 1
        text, _ = self._escaped(inside=False)
        self._one(text)

    def _escaped(self, inside: bool) -> tuple[str, int | None]:
        """Translate an escape after its backslash: the text in Rust's dialect, and the code if it is one character."""
        if self._at == len(self._text):
            raise PatternError("it ends with a backslash")
        character = self._text[self._at]
        for form, take in ((_PROPERTY, self._property), (_HEX, self._hex)):
            found = form.match(self._text, self._at)
            if found is not None:
                self._at = found.end()
                return take(found)
        self._at += 1
        if character in "dDwWsS":
            text = self._class_of(character)
            return text[1:-1] if inside and character in "dw" and text[0] == "[" else text, None
        code = self._simple(character, inside)
        return _char(self._code(code)), code

    def _class_of(self, character: str) -> str:
        if character in "dD":
            return "[0-9]" if character == "d" else "[^0-9]"
        if not self._search or character in "sS":
            return "\\" + character
        return "[0-9A-Za-z_]" if character == "w" else "[^0-9A-Za-z_]"

    def _property(self, found: re.Match[str]) -> tuple[str, None]:
        return "\\" + found[0], None

    def _hex(self, found: re.Match[str]) -> tuple[str, int]:
        code = self._code(int(found[1] or found[2] or found[3], 16))
        if code > 0x10FFFF:
            raise PatternError(f"\\{found[0]} is no character")
        return _char(code), code

    def _simple(self, character: str, inside: bool) -> int:
        if character in _NAMED:
            return _NAMED[character]
        if character == "c" and self._text[self._at : self._at + 1].isalpha():
            self._at += 1
            return ord(self._text[self._at - 1]) % 32
        if character == "0" and not self._text[self._at : self._at + 1].isdigit():
            return 0
        if character == "b" and inside:
            return 0x08
        if character.isdigit() or character == "k":
            raise PatternError("a backreference is not supported")
        if character in "bB":
            raise PatternError(f"the word boundary \\{character} is not supported")
        if character.isalnum():
            raise PatternError(f"the escape \\{character} is unknown")
        return ord(character)

    def _class(self) -> None:
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        if self._text.startswith("]", self._at):
            raise PatternError("a class [] is empty, or begins with a ']' that needs a backslash")
        out = ["[^" if negated else "["]
        while not self._text.startswith("]", self._at):
            out.append(self._item())
        self._at += 1
        self._one("".join(out) + "]")

    def _item(self) -> str:
        text, code = self._member()
        after = self._text[self._at + 1 : self._at + 2]
        if not self._text.startswith("-", self._at) or after in ("]", ""):
            return text
        self._at += 1
        upper, last = self._member()
        if code is None or last is None or last < code:
            raise PatternError(f"the range {text}-{upper} in a class is wrong")
        return f"{text}-{upper}"

    def _member(self) -> tuple[str, int | None]:
        if self._at >= len(self._text):
            raise PatternError("a class is not closed")
        character = self._text[self._at]
        self._at += 1
        if character == "\\":
            return self._escaped(inside=True)
        return _char(self._code(ord(character))), ord(character)


_HANDLERS = {
    ".": _Scanner._dot, "^": _Scanner._anchor, "$": _Scanner._anchor, "|": _Scanner._branch, "(": _Scanner._open,
    ")": _Scanner._close, "*": _Scanner._repeat, "+": _Scanner._repeat, "?": _Scanner._repeat, "{": _Scanner._brace,
    "\\": _Scanner._escape, "[": _Scanner._class,
}  # fmt: skip
