"""Measure the cost of grammars while serving: a part of `bench/grammar.py`."""

from __future__ import annotations

import asyncio
import statistics

from tokenmill.bench.client import Ask
from tokenmill.bench.load import make_prompt, run_round

LIST_OF_PEOPLE: dict[str, object] = {
    "type": "array", "minItems": 1000, "items": {
        "type": "object", "additionalProperties": False, "required": ["name", "age", "email", "role", "notes"],
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 20}, "age": {"type": "integer", "minimum": 0},
            "email": {"type": "string", "format": "email"}, "role": {"enum": ["admin", "editor", "reader"]},
            "notes": {"type": "string", "minLength": 20, "maxLength": 200},
        },
    },
}  # fmt: skip
"""Schema whose answers exceed the token limit, so that they have as many tokens as unconstrained answers."""


def serving(base_url: str, streams: int, new_tokens: int, passes: int) -> None:
    """Print the tokens per second of streams with a schema, and of as many without one, measured alternately."""
    rates: dict[str, list[float]] = {"free": [], "constrained": []}
    for number in range(passes + 1):
        for kind, found in rates.items():
            schema = LIST_OF_PEOPLE if kind == "constrained" else None
            seeds = range(streams * number, streams * (number + 1))
            asks = [Ask(make_prompt(s, 60), new_tokens, 0.8, seed=s, schema=schema) for s in seeds]
            report = asyncio.run(run_round(base_url, asks))
            if report.errors or report.tokens < streams * new_tokens:
                raise SystemExit(f"{kind}: {report.errors} errors, {report.tokens} tokens of {streams * new_tokens}")
            found += [report.tokens_per_s] if number else []  # the first round warms up
    free, constrained = (statistics.median(found) for found in rates.values())
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    print(f"over HTTP, {streams} streams of {new_tokens} tokens, {passes} rounds in turns: free {free:.0f} tokens/s, "
          f"constrained {constrained:.0f}; ratio {statistics.median(ratios):.2f}, "
          f"from {min(ratios):.2f} to {max(ratios):.2f}")  # fmt: skip
