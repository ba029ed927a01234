"""A small vocabulary, and checks of grammars token by token."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np

from tokenmill.grammar.base import Backend, Grammar, Matcher, Vocabulary
from tokenmill.grammar.llguidance import LLGuidance

END, OTHER_END, SPECIAL = 256, 257, 258
LONGER = ('{"', '":', '",', '"}', "ab", "abc", "foo", "bar", "name", "hello", " world", "12", "00", "true", "null", "é",
          "日本", "<think>", "</", "think", ">", "  ", "\n  ", "[]", "{}", "\\n", "x", "yx")  # fmt: skip


def small_vocabulary() -> Vocabulary:
    """Return all bytes, two end tokens, a special token that looks like text, longer tokens, and unused logits."""
    tokens = [bytes([i]) for i in range(256)] + [b"<end>", b"<stop>", b"abc"] + [text.encode() for text in LONGER]
    return Vocabulary.of(tokens.__getitem__, len(tokens), 320, (END, OTHER_END), (SPECIAL,))


def backend(encode: Any = None) -> Backend:
    """Return the grammar backend over the small vocabulary."""
    return LLGuidance(small_vocabulary(), encode)


def made(chosen: Backend, kind: str, source: str) -> Grammar:
    """Return a grammar compiled in this process."""
    return chosen.finish(chosen.prepare(kind, source))


def allowed(matcher: Matcher, vocabulary: Vocabulary) -> set[int]:
    """Return the ids that the mask allows. Assert that only its own row changed, from dirty contents."""
    mask = np.full((3, vocabulary.mask_words), 0xDEADBEEF, np.uint32)
    matcher.fill_mask(mask, 1)
    assert (mask[[0, 2]] == 0xDEADBEEF).all()
    bits = np.unpackbits(mask[1].view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[: vocabulary.size]).tolist())


def accepts(grammar: Grammar, text: str) -> bool:
    """Return True if `text` is a complete answer, byte by byte."""
    matcher = grammar.matcher()
    return all(matcher.accept(byte) for byte in text.encode()) and matcher.accept(END)


def mutated(value: Any, draw: random.Random) -> Any:
    """Return a slightly changed JSON value, often no longer valid."""
    if isinstance(value, dict) and value and draw.random() < 0.7:
        out, key = dict(value), draw.choice(list(value))
        what = draw.randrange(4)
        if what == 0:
            del out[key]
        elif what == 1:
            out[draw.choice(["extra", "x", key + "x", "name"])] = draw.choice([1, "a", None, []])
        else:
            out[key] = mutated(value[key], draw)
        return out
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], mutated(value[place], draw), *value[place + draw.randrange(2) :]]
    if isinstance(value, str) and draw.random() < 0.7:
        return draw.choice([value + "a", value[1:], value.upper(), value[:-1] + "é", value * 2])
    if isinstance(value, int | float) and not isinstance(value, bool) and draw.random() < 0.7:
        return draw.choice([value + 1, -value, value * 1000, value + 0.5, value - 1])
    return draw.choice([None, True, 0, 1.5, -7, "", "abc", [], {}, [1], {"a": 1}])


def compact(value: Any) -> str:
    """Return JSON text without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
