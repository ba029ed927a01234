"""Writes grammars in llguidance's Lark: texts with special tokens, JSON, and free text without certain substrings.

llguidance's lexer takes the longest lexeme and does not backtrack, and the cost of a mask depends on the form of the
lexemes: in a state with a lexeme that is a repetition of characters, whole slices of the vocabulary are allowed at
once. So free text is cut into such lexemes, at the characters with which forbidden substrings begin and end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenmill.grammar.patterns import literal
from tokenmill.text.reader import alternatives

SPACES = r"[\s\x1C-\x1F]*"
"""A regular expression: white space as Python's `\\s` and `str.isspace` know it."""
_SPACING = {"whitespace_pattern": "[ \\n\\t]{1,16}"}  # without a bound, a model can write spaces for ever


class Free(NamedTuple):
    """Free text, which may end anywhere: `plain` or nothing, then any number of `more`. `plain`: a terminal for text
    without the first characters of forbidden substrings."""

    plain: str
    more: str

    @property
    def text(self) -> str:
        """An expression for any such text."""
        return f"{self.plain}? ({self.more})*" if self.more else f"{self.plain}?"


class Lark:
    """Grammar that is being written, rule by rule. `special_ids`: special tokens by text."""

    def __init__(self, special_ids: Mapping[str, int] | None = None) -> None:
        self._ids = special_ids or {}
        self._special = re.compile(f"({alternatives(list(self._ids))})" if self._ids else r"((?!))")
        self._rules: dict[str, str] = {}

    def text(self, text: str) -> str:
        """Return an expression for exactly this text: special tokens by id, the rest quoted."""
        parts = [part for part in self._special.split(text) if part]
        return " ".join(f"<[{self._ids[part]}]>" if part in self._ids else quoted(part) for part in parts)

    def is_special(self, text: str) -> bool:
        """Return True for the text of a special token."""
        return text in self._ids

    def rule(self, name: str, body: str) -> str:
        """Add or change a rule, and return its name."""
        self._rules[name] = body
        return name

    def json(self, name: str, schema: Any) -> str:
        """Add a rule for JSON that fits `schema`, and return its name."""
        value = schema if isinstance(schema, dict) else {} if schema is True or schema is None else {"not": {}}
        options = value.get("x-guidance")
        merged = {**value, "x-guidance": {**_SPACING, **(options if isinstance(options, dict) else {})}}
        return self.rule(name, "%json " + json.dumps(merged, ensure_ascii=False))

    def free(self, name: str, without: Sequence[str], spoken: Iterable[str] = ()) -> Free:
        """Add rules for text that contains none of the texts `without`. `spoken`: special tokens that it may contain.

        A text of `without` may not contain, behind its beginning, a character with which one of them begins, or with
        which one of the same first character ends.
        """
        families: dict[str, list[str]] = {}
        for text in without:
            families.setdefault(text[0], []).append(text)
        upper = name.upper()
        firsts = "".join(map(literal, families))
        plain = self.rule(f"{upper}_PLAIN", f"/[^{firsts}]+/" if families else "/(?s:.)+/")
        more = [self.text(text) for text in dict.fromkeys(spoken) if self.is_special(text) and text not in without]
        opened = []
        for number, (first, texts) in enumerate(families.items()):
            inside, shut, least = _family(first, texts, firsts)
            opened.append(self.rule(f"{upper}_OPEN_{number}", inside))
            more.append(self.rule(f"{upper}_SHUT_{number}", shut))
            for few in range(1, least):
                body = f"/{literal(first)}{{{few}}}[^{firsts}]*/"
                opened.append(self.rule(f"{upper}_FEW_{number}_{few}", body))
        options = [*opened, *([f"({' | '.join(more)}) {plain}?"] if more else [])]
        return Free(plain, " | ".join(options))

    def source(self) -> str:
        """Return the grammar's text."""
        return "".join(f"{name}: {body}\n" for name, body in self._rules.items())


def _family(first: str, texts: Sequence[str], firsts: str) -> tuple[str, str, int]:
    """Return two terminals for text that is none of `texts` but begins like them: up to a character that could end one,
    so that nothing plain follows, and with that. And return the least number of repetitions of their first character.
    `firsts`: their first characters, inside of a class of characters."""
    lasts = {text[-1] for text in texts}
    runs = {text: len(text) - len(text.lstrip(first)) for text in texts}  # ``` begins with three
    ends = "".join(map(literal, sorted(lasts)))
    assert not any(re.search(f"[{firsts}{ends}]", text[run:-1]) or text[-1] in firsts for text, run in runs.items())
    least, begin = min(runs.values()), literal(first)
    many = f"{{{least},}}" if max(runs.values()) > 1 else ""
    inside = f"{begin}{many}[^{firsts}{ends}]*"
    barred = (f"{begin}{f'{{{run},}}' if many else ''}{literal(text[run:])}" for text, run in runs.items())
    return f"/{inside}/", f"/{inside}[{ends}]/ & ~/{'|'.join(barred)}/", least


def quoted(text: str) -> str:
    """Return a string in Lark's notation."""
    return json.dumps(text, ensure_ascii=False)


def slashed(pattern: str) -> str:
    """Return a regular expression for use between slashes."""
    return re.sub(r"\\.|/", lambda found: "\\/" if found.group() == "/" else found.group(), pattern, flags=re.DOTALL)
