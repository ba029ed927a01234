"""Strict functions under `tool_choice: auto`: every call that is read fits its schema, for any output of a model."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.support_slow import mostly_slow
from tests.support_tools import BARE, UNLIKE, WRITERS, Call, router_of
from tests.support_walks import Tokens, compiled, special_markers, walk
from tests.test_tool_grammars import FORMATS, TOOLS, harmony, weather, written, wrong
from tokenmill.text.router import fold
from tokenmill.text.tools import by_name
from tokenmill.text.tools.base import GrammarRequest

SCHEMA = Draft202012Validator(TOOLS[0]["function"]["parameters"])
WALKS, SEED = int(os.environ.get("WALKS", "15")), os.environ.get("SEED", "")
PROSE = ("", "Hello <b>you</b> [1] ```py\nx\n``` ", "\n\n", '{"a": [1]} ', '[{"name": "Ada"}] ', "get_weather(1) ",
         "```json\n")  # fmt: skip


def tempting(name: str, draw: random.Random) -> str:
    """Return prose and calls, valid and invalid, in spellings that the parser reads and in similar ones."""
    good = draw.choice([weather(name), (weather(name)[0], {**weather(name)[1], "tags": ["x", "</parameter>"]})])
    others: list[Call] = [("now", {}), ("note", {"days": "x", "deep": [good[1]]}), ("other", {"a": 1})]
    calls = [*wrong(name), *others]
    parts = []
    for _ in range(draw.randint(1, 3)):
        made = [good if draw.random() < 0.4 else draw.choice(calls) for _ in range(draw.randint(1, 2))]
        writer = draw.choice([lambda calls: written(name, calls), WRITERS[name], WRITERS[draw.choice(FORMATS)]])
        parts += [draw.choice(PROSE) if parts or name not in BARE else "", reworded(writer(made), draw)]
    text = "".join(parts) + draw.choice(PROSE)
    if name == "harmony" and draw.random() < 0.7:
        return harmony(text)
    return text


def reworded(text: str, draw: random.Random) -> str:
    """Return the same text, sometimes in another spelling."""
    for before, behind in (
        ('"name"', '"n\\u0061me"'), ("get_weather", "get\\u005fweather"), ('"name": ', '"name" :\n'), ('{"', '{ "'),
        ('{"name"', '{"type": "function", "name"'), ('{"name"', '{"id": 1, "name"'), ("<tool_call>\n", ""), ("[", "[ "),
        ("<|tool_call|>", "functools"), ('"arguments"', '"parameters"'), ("}}", "}"), ("(", " ("),
        ("to=functions.", "to="), ('"name"', "'name'"), ('"get_weather"', "'get_weather'"), ("}", "}}"),
        ("}, {", "}\n{"), ('"city"', "'city'"), ("}\n</tool_call>\n<tool_call>", "}"), ("</parameter>", ""),
        ("</function>", ""),
        ('{"name": "get_weather", ', '{"arguments": {"days": "x"}, "name": "get_weather", '),
    ):  # fmt: skip
        if draw.random() < 0.15:
            text = text.replace(before, behind)
    return text


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", mostly_slow(FORMATS, UNLIKE))
def test_every_call_of_a_strict_function_fits(name: str, special: bool) -> None:
    if name == "harmony" and not special:
        return
    tokens, form = Tokens(special_markers(name) if special else ()), by_name(name)
    after = form.trigger if form.trigger in tokens.ids and not form.bare else ""
    source = form.grammar(GrammarRequest(TOOLS, "behind" if after else "answer", True, tokens.ids))
    grammar = compiled(source, tokens)
    draw, called, text_alone = random.Random(SEED + f"{name} {special}"), 0, 0
    for _ in range(WALKS):
        wish = tempting(name, draw)
        text = walk(grammar.matcher(), tokens, wish, draw, after)
        strict = [arguments for called_name, arguments in calls_in(name, text) if called_name == "get_weather"]
        for arguments in strict:
            errors = [error.message for error in SCHEMA.iter_errors(arguments)]
            assert not errors, f"{wish}\n---\n{text}\n---\n{errors}"
        called += len(strict)
        text_alone += not calls_in(name, text)
    assert called > WALKS / 20
    assert text_alone > WALKS / 30


def calls_in(name: str, text: str) -> list[tuple[str | None, Any]]:
    router = router_of("", parser=name, tools=TOOLS, held="answer")
    answer = fold([router.push(text), router.finish()])
    found = []
    for call in answer.calls:
        try:
            found.append((call.name, json.loads(call.arguments)))
        except ValueError:  # cut off
            continue
    assert len(found) >= router.complete_calls
    return found
