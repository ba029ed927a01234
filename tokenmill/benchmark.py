"""`text-generation-benchmark`: measure the engine by batch size, without HTTP, as TGI's command does.

For each batch size, that many prompts of equal length are prefilled together and then decoded, ignoring end-of-sequence
tokens. TGI's command measures running shards; this one loads the engine in its own process. The tables have TGI's form.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from tokenmill import fetch, options
from tokenmill.bench.load import make_prompt, percentile
from tokenmill.config import Settings
from tokenmill.errors import ArgumentError
from tokenmill.options import Option
from tokenmill.parallel.group import Group
from tokenmill.runtime.assembly import assemble
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.runtime.worker import engine_options
from tokenmill.text.load import load_tokenizer
from tokenmill.wire.messages import SamplingParams, StoppingParams

_BATCH_SIZES = (1, 2, 4, 8, 16, 32)


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the command. Model and backend are set by the server's environment variables."""

    # fmt: off
    tokenizer_name: Annotated[str, Option("The model: a Hub id, a folder or a .gguf file.", short="-t")] = ""
    revision: Annotated[str, Option("Branch, tag or commit of a model on the Hub.")] = ""
    sequence_length: Annotated[int, Option("Tokens of each prompt.", at_least=1, short="-s")] = 10
    decode_length: Annotated[int, Option("Tokens to generate for each.", at_least=1, short="-d")] = 8
    runs: Annotated[int, Option("Runs that count.", at_least=1, short="-r")] = 10
    warmups: Annotated[int, Option("Runs before them that do not.", at_least=0, short="-w")] = 1
    master_shard_uds_path: Annotated[str, Option("TGI: socket of the shards.", short="-m", no_effect=(
        "the engine runs in this process."))] = "/tmp/text-generation-server-0"
    temperature: Annotated[float | None, Option("As in a request.", at_least=0)] = None
    top_k: Annotated[int | None, Option("As in a request.", at_least=1)] = None
    top_p: Annotated[float | None, Option("As in a request.", at_least=0, at_most=1)] = None
    typical_p: Annotated[float | None, Option("As in a request.", at_least=0, at_most=1)] = None
    repetition_penalty: Annotated[float | None, Option("As in a request.", at_least=0)] = None
    frequency_penalty: Annotated[float | None, Option("As in a request.", at_least=-2, at_most=2)] = None
    top_n_tokens: Annotated[int | None, Option("Alternatives of each token.", at_least=0, at_most=20)] = None
    watermark: Annotated[bool, Option("As in a request.")] = False
    do_sample: Annotated[bool, Option("Sample, if nothing else says so.")] = False
    # fmt: on

    def sampling(self) -> SamplingParams:
        """Sampling parameters; greedy unless an option of sampling is set, as in TGI."""
        asked = (self.temperature, self.top_k, self.top_p, self.typical_p)
        sampled = self.do_sample or any(value is not None for value in asked)
        return SamplingParams(
            temperature=(1.0 if self.temperature is None else self.temperature) if sampled else 0.0,
            top_k=self.top_k or 0,
            top_p=self.top_p or 1.0,
            typical_p=self.typical_p or 1.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logprobs=self.top_n_tokens or -1,
            watermark_gamma=0.5 if self.watermark else 0.0,
            watermark_delta=2.0 if self.watermark else 0.0,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """Timings of one run in seconds: until every prompt has its first token, and from then to the last token."""

    prefill_s: float
    decode_s: float


def main(words: Sequence[str]) -> int:
    """Measure, print the tables and return the exit code. Raises StartError if the model cannot be run."""
    wanted, batch_sizes = _parse(words)
    settings = Settings.from_env(
        model_id=wanted.tokenizer_name, revision=wanted.revision, max_batch_size=max(batch_sizes)
    )
    source = fetch.fetch(settings, lambda progress: None)
    tokenizer = load_tokenizer(source)
    prompt = tokenizer.encode(make_prompt(0, 2 * wanted.sequence_length))[: wanted.sequence_length]
    with OfflineEngine(assemble(source, engine_options(settings), Group(), lambda message: None)) as engine:
        needed, total = wanted.sequence_length + wanted.decode_length, engine.info.max_total_tokens
        if needed > total:
            raise ArgumentError(f"A prompt and its answer are {needed} tokens, but the model serves {total} at most.")
        results = {size: _measure(engine, prompt, wanted, size) for size in batch_sizes}
    print(tables(source.model_id, wanted, results))
    return 0


def _parse(words: Sequence[str]) -> tuple[Wanted, list[int]]:
    about = "Measure the engine's own speed by batch size. Options of the model are the server's variables."
    parser = options.Parser(prog="text-generation-benchmark", description=about)
    options.add_options(parser, Wanted, flags=True)
    parser.add_argument("--batch-size", "-b", type=int, action="append", metavar="INT", help=(
        f"prompts at once; repeatable [default {' '.join(map(str, _BATCH_SIZES))}]"))  # fmt: skip
    given = parser.parse_args(list(words))
    sizes = given.batch_size or list(_BATCH_SIZES)
    if min(sizes) < 1:
        parser.error(f"--batch-size: {min(sizes)} is too small: at least 1")
    return _collected(given), sizes


def _collected(given: argparse.Namespace) -> Wanted:
    values, warnings = options.collect(Wanted, given, Settings.environ())
    for warning in warnings:
        print(warning, file=sys.stderr)
    return Wanted(**values)


def _measure(engine: OfflineEngine, prompt: Sequence[int], wanted: Wanted, size: int) -> list[Run]:
    runs = []
    for number in range(-wanted.warmups, wanted.runs):
        run = run_once(engine, prompt, wanted, size, number)
        if number >= 0:
            runs.append(run)
        print(f"\rbatch size {size}: run {max(number + 1, 0)} of {wanted.runs} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return runs


def run_once(engine: OfflineEngine, prompt: Sequence[int], wanted: Wanted, size: int, number: int) -> Run:
    """Measure one run. Its prompts share no prefix with each other or with those of earlier runs."""
    stopping = StoppingParams(wanted.decode_length)
    salts = [f"benchmark {size} {number} {i}".encode() for i in range(size)]
    began = time.perf_counter()
    answers = [engine.outputs(engine.submit(prompt, wanted.sampling(), stopping, salt)) for salt in salts]
    for answer in answers:
        next(output for output in answer if output.token_ids)
    prefilled = time.perf_counter()
    for answer in answers:
        for _ in answer:
            pass
    return Run(prefilled - began, time.perf_counter() - prefilled)


def tables(model_id: str, wanted: Wanted, results: dict[int, list[Run]]) -> str:
    """Format TGI's three tables in Markdown: parameters, latencies, throughput."""
    rest = wanted.decode_length - 1
    rows = [("Model", model_id), ("Sequence Length", wanted.sequence_length), ("Decode Length", wanted.decode_length),
            ("Top N Tokens", wanted.top_n_tokens), ("N Runs", wanted.runs), ("Warmups", wanted.warmups),
            ("Temperature", wanted.temperature), ("Top K", wanted.top_k), ("Top P", wanted.top_p),
            ("Typical P", wanted.typical_p), ("Repetition Penalty", wanted.repetition_penalty),
            ("Frequency Penalty", wanted.frequency_penalty), ("Watermark", wanted.watermark),
            ("Do Sample", wanted.do_sample)]  # fmt: skip
    latencies: list[tuple[object, ...]] = []
    rates: list[tuple[object, ...]] = []
    for size, runs in results.items():
        prefill, decode = [run.prefill_s for run in runs], [run.decode_s for run in runs]
        latencies.append(("Prefill", size, *_latency(prefill)))
        rates.append(("Prefill", size, *_rate(size / s for s in prefill)))
        if rest:
            latencies.append(("Decode (token)", size, *_latency([s / rest for s in decode])))
            latencies.append(("Decode (total)", size, *_latency(decode)))
            rates.append(("Decode", size, *_rate(size * rest / s for s in decode)))
    head = ("Step", "Batch Size", "Average", "Lowest", "Highest")
    return "\n".join((
        _table(("Parameter", "Value"), rows), _table((*head, "p50", "p90", "p99"), latencies), _table(head, rates)
    ))  # fmt: skip


def _latency(seconds: list[float]) -> list[str]:
    values = [sum(seconds) / len(seconds), min(seconds), max(seconds)]
    values += [percentile(seconds, share) for share in (0.5, 0.9, 0.99)]
    return [f"{1000 * value:.2f} ms" for value in values]


def _rate(per_second: Iterable[float]) -> list[str]:
    rates = list(per_second)
    return [f"{value:.2f} tokens/secs" for value in (sum(rates) / len(rates), min(rates), max(rates))]


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |" for row in cells]
    lines.insert(1, f"|{'|'.join('-' * (w + 2) for w in widths)}|")
    return "\n".join(lines) + "\n"
