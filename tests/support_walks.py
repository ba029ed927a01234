"""A simulated model that writes at random, or towards a given text, under a grammar."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from tests.support_grammar import made
from tokenmill.grammar.base import Grammar, Matcher, Vocabulary
from tokenmill.grammar.llguidance import LLGuidance
from tokenmill.text.tools import by_name

PLAIN = ("```", "```json", "```tool_code", "functools", "Action:\n```json", "Action: ```json", "<function=",
         "<parameter=", "</parameter>", "</function>", '<invoke name="')  # fmt: skip
"""Markers that no tokenizer has as special tokens."""
WORDS = ('{"', '":', '",', '"}', "}}", ": ", ", ", "get_weather", "now", "name", "arguments", "parameters", "city", "C",
         "K", "unit", "days", "tool_code", "json", "<tool_call>", "[TOOL_CALLS]", "<function=", ">\n", "\n\n", "[{",
         "}]", "(", "=", "call:", "function", "to=functions.", "12", "true", "None", "</parameter>", "</arg_value>",
         "<escape>", ', "tags": ["', "\n", "\\u", "é", " Hello", "`", "<", "</")  # fmt: skip


class Tokens:
    """Tokenizer of bytes, some words, an end token, and the markers that are special tokens."""

    end = 256

    def __init__(self, markers: Sequence[str]) -> None:
        self.texts = [bytes([i]) for i in range(256)] + [b"<eos>"]
        self.ids = {marker: 257 + i for i, marker in enumerate(dict.fromkeys(markers))}
        self.texts += [marker.encode() for marker in self.ids] + [word.encode() for word in WORDS]
        specials = (self.end, *self.ids.values())
        self.vocabulary = Vocabulary(tuple(self.texts), (self.end,), specials, len(self.texts))

    def encode(self, text: str) -> list[int]:
        """Encode text as special tokens and bytes."""
        found: list[int] = []
        while text:
            marker = next((marker for marker in sorted(self.ids, key=len, reverse=True) if text.startswith(marker)), "")
            found += [self.ids[marker]] if marker else text[0].encode()
            text = text[len(marker) or 1 :]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.texts[i] for i in ids if i != self.end).decode(errors="replace")


def special_markers(name: str) -> tuple[str, ...]:
    """Return the markers of a format that its models have as special tokens."""
    return tuple(marker for marker in by_name(name).markers if marker not in PLAIN)


def compiled(source: str, tokens: Tokens) -> Grammar:
    """Return a compiled Lark grammar."""
    return made(LLGuidance(tokens.vocabulary), "lark", source)


def walk(matcher: Matcher, tokens: Tokens, wish: str, draw: random.Random, after: str = "", most: int = 400) -> str:
    """Return the output of a model that aims at `wish`, but deviates where it must, and sometimes where it can.

    `after`: a special token behind which the grammar applies.
    """
    mask, ids = tokens.vocabulary.new_mask(1), list[int]()
    wished, careful = tokens.encode(wish)[::-1], draw.choice((1.0, 0.997, 0.97))
    begins = tokens.ids.get(after)
    while len(ids) < most:
        begun = begins is None or begins in ids
        if begun:
            matcher.fill_mask(mask, 0)
        else:
            mask[:] = 0xFFFFFFFF
        allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little")[: len(tokens.texts)]).tolist()
        assert allowed, (tokens.decode(ids), matcher.failure)
        if wished and wished[-1] in allowed and draw.random() < careful:
            token_id = wished.pop()
        elif not wished and tokens.end in allowed and draw.random() < 0.5:
            token_id = tokens.end
        else:
            long = [i for i in allowed if i > tokens.end]
            token_id = draw.choice(long if long and draw.random() < 0.7 else allowed)
        assert not begun or matcher.accept(token_id), tokens.decode([*ids, token_id])
        if token_id == tokens.end:
            break
        ids.append(token_id)
    return tokens.decode(ids)
