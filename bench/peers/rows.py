"""Rows of the comparison: the requests to a server, and the resulting figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.peers.servers import Needs, Running, Server, Tokenmill
from tokenmill.bench.client import Ask
from tokenmill.bench.load import Disturbed, Report, make_prompt
from tokenmill.text.load import load_tokenizer
from tokenmill.weights.source import ModelSource

Figures = dict[str, float]
Measure = Callable[[Running, int], Figures]

_SHORT = 118  # words: a prompt of about 125 tokens
_NEW = 128
SAMPLED: Mapping[str, Any] = {
    "temperature": 0.8, "top_p": 0.95, "frequency_penalty": 0.3, "presence_penalty": 0.3, "seed": 7
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Row of the table.

    `measure`: function of a ready server and a number that makes the prompts unique. `settled`: True if the server must
    have finished its deferred idle work first.
    """

    name: str
    needs: Needs
    measure: Measure
    ours_only: bool = False
    settled: bool = True


def asks(number: int, group: int, words: int = _SHORT, new_tokens: int = _NEW, **more: Any) -> list[Ask]:
    """Return requests without a common prefix, different for each `group`."""
    return [Ask(make_prompt(group * 1000 + i, words), new_tokens, **more) for i in range(number)]


def _figures(found: Report | Disturbed) -> Figures:
    return {name: getattr(found, name) for name in type(found).__slots__}


def _warm(server: Running, seed: int) -> None:
    server.round(asks(1, seed * 10 + 9, 20, 8))


def _streams(number: int) -> Measure:
    def measure(server: Running, seed: int) -> Figures:
        _warm(server, seed)
        return _figures(server.round(asks(number, seed * 10)))

    return measure


def _prefill(words: int, rounds: int) -> Measure:
    """Measure one prompt with one new token: the best of some rounds."""

    def measure(server: Running, seed: int) -> Figures:
        _warm(server, seed)
        found = [server.round(asks(1, seed * 10 + k, words, 1)) for k in range(rounds)]
        best = min(found, key=lambda r: r.ttft_p50_s / max(1, r.prompt_tokens))
        return {
            "prompt_tokens": best.prompt_tokens,
            "prefill_tokens_per_s": best.prompt_tokens / best.ttft_p50_s,
            "ttft_p50_s": best.ttft_p50_s,
            "errors": sum(r.errors for r in found),
        }

    return measure


def _arrivals(streams: int, words: int, arrivals: int, new_tokens: int) -> Measure:
    """Measure prompts that arrive one after another while streams decode."""

    def measure(server: Running, seed: int) -> Figures:
        _warm(server, seed)
        background = asks(streams, seed * 10, _SHORT, new_tokens)
        return _figures(server.disturbed(background, asks(arrivals, seed * 10 + 1, words, 1)))

    return measure


def stream_rows(numbers: list[int]) -> list[Row]:
    """Return the rows of decoding: greedy streams of 128 tokens after prompts of about 125 that share no prefix."""
    return [Row(f"streams {n}", Needs(n, 320), _streams(n)) for n in numbers]


def first_row() -> Row:
    """Return the row of the first answer: one stream, sent as soon as the server is ready."""

    def measure(server: Running, seed: int) -> Figures:
        return _figures(server.round(asks(1, seed * 10)))

    return Row("first answer", Needs(1, 320), measure, settled=False)


def standard_rows() -> list[Row]:
    """Return the rows of prefill, and of short and long prompts that arrive while eight streams decode."""
    return [
        Row("prefill 512", Needs(1, 1024), _prefill(500, 3)),
        Row("TTFT under load", Needs(9, 1152), _arrivals(8, _SHORT, 8, 900)),
    ]


def mixed_row() -> Row:
    """Return the row of eight decoding streams while prompts of 2,000 tokens arrive."""
    return Row("mixed", Needs(9, 2304), _arrivals(8, 1970, 3, 1900))


def long_rows() -> list[Row]:
    """Return the rows of long contexts: 32 streams after prompts of 2,000 tokens, and one prompt of 8,000."""

    def measure(server: Running, seed: int) -> Figures:
        _warm(server, seed)
        return _figures(server.round(asks(32, seed * 10, 1970, 64)))

    return [
        Row("32 streams at 2,000 tokens", Needs(32, 2304), measure),
        Row("prefill 8,000", Needs(1, 8192), _prefill(7900, 1)),
    ]


def sampling_row() -> Row:
    """Return the row of 32 streams with top-p and penalties, compared with greedy ones in alternating rounds."""

    def measure(server: Running, seed: int) -> Figures:
        _warm(server, seed)
        server.round(asks(32, seed * 10 + 5, 20, 8, **SAMPLED))
        greedy: list[Report] = []
        sampled: list[Report] = []
        for k in range(2):
            greedy.append(server.round(asks(32, seed * 10 + k)))
            sampled.append(server.round(asks(32, seed * 10 + 2 + k, **SAMPLED)))
        best, cost = (max(r.decode_tokens_per_s for r in reports) for reports in (greedy, sampled))
        return {
            "greedy_tokens_per_s": best,
            "sampled_tokens_per_s": cost,
            "cost": 1 - cost / best,
            "errors": sum(r.errors for r in greedy + sampled),
        }

    return Row("sampling cost", Needs(32, 320), measure, ours_only=True)


def http_cost(server: Server, source: ModelSource, seed: int) -> Figures:
    """Compare 32 streams over HTTP and in process, in alternating rounds: whole requests, prompts included."""
    assert isinstance(server, Tokenmill)
    http, inside = [], []
    tokenizer = load_tokenizer(source)
    for k in range(2):
        asked = asks(32, seed * 10 + k)
        warm = asks(32, seed * 10 + 7 + k, 20, 8)
        with server.start(Needs(32, 320)) as running:
            running.settle()
            running.round(warm)
            http.append(running.round(asked).tokens_per_s)
        with server.in_process() as engine:
            engine.settle()
            for wanted in (warm, asked):
                found = engine.ask(
                    {"prompts": [tokenizer.encode(str(a.prompt)) for a in wanted], "new_tokens": wanted[0].new_tokens}
                )
            inside.append(found["tokens"] / found["wall_s"])
    return {
        "http_tokens_per_s": max(http),
        "in_process_tokens_per_s": max(inside),
        "cost": 1 - max(http) / max(inside),
    }
