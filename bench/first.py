"""Compare the first answer of a server with its later ones: `python -m bench.first [--starts N]`.

Each start sends one request as soon as `/health` returns 200, waits until the server is idle, and repeats the request
several times. In a second round of starts, the first request is constrained by a JSON schema. Several servers, such as
two checkouts, alternate: `--server before=PYTHONPATH=/old tokenmill serve --server after=tokenmill serve`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import psutil
import uvloop

from bench.peers.servers import Http, Needs, Tokenmill
from tokenmill.bench.client import Ask, complete
from tokenmill.bench.load import make_prompt, percentile
from tokenmill.host import usable_cpus

Figures = dict[str, float]

_SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_SHOWN = {
    "tokens_per_s": ("tok/s", 1.0, 0), "itl_p50_s": ("ITL p50 ms", 1e3, 1), "itl_p99_s": ("p99 ms", 1e3, 1),
    "gap_s": ("longest ms", 1e3, 0), "ttft_s": ("TTFT ms", 1e3, 0),
}  # fmt: skip
_ALLOWED = 1.15  # factor by which a first answer's tokens/s and p99 may be worse than a later one's


def main() -> None:
    """Measure, print the tables, write the figures as JSON if asked."""
    options = _options()
    servers = [Tokenmill(name, command) for name, _, command in (given.partition("=") for given in options.server)]
    record: list[dict[str, object]] = []
    for start in range(options.starts):
        for schema in (None, _SCHEMA) if options.schemas else (None,):
            turn = start % len(servers)  # no server is always first
            for server in servers[turn:] + servers[:turn]:
                what = "schema" if schema else "text"
                entry = {"server": server.name, "start": start + 1, "asked": what, "load": psutil.getloadavg()[0]}
                record.append({**entry, **_measure(server, options, start, schema)})
                print(json.dumps(record[-1]), file=sys.stderr, flush=True)
    if options.json:
        about = {"date": time.strftime("%Y-%m-%d"), "cpu": platform.processor() or platform.machine()}
        about |= {"cpus": usable_cpus(), "servers": options.server}
        options.json.write_text(json.dumps({**about, "starts": record}, indent=1) + "\n")
    for server in servers:
        for what in ("text", "schema") if options.schemas else ("text",):
            print(_table(server.name, what, [r for r in record if (r["server"], r["asked"]) == (server.name, what)]))


def _measure(
    server: Tokenmill, options: argparse.Namespace, start: int, schema: dict[str, object] | None
) -> dict[str, object]:
    asks = [
        Ask(make_prompt(start * 100 + k, options.words), options.new_tokens, schema=schema)
        for k in range(options.later + 1)
    ]
    with server.start(Needs(1, 1024)) as running:
        assert isinstance(running, Http)
        first = _answer(running, asks[0])
        put_off = running.settle()
        later = [_answer(running, ask) for ask in asks[1:]]
        return {"start_s": running.start_s, "put_off_cpu_s": put_off, "first": first, "later": later}


def _answer(running: Http, ask: Ask) -> Figures:
    answer = uvloop.run(complete(running.base_url, ask))
    if answer.error or len(answer.events) < 2:
        raise SystemExit(f"an answer failed: {answer.error or answer.text!r}")
    gaps = answer.gaps_s
    return {
        "tokens_per_s": (answer.tokens - 1) / sum(gaps),
        "itl_p50_s": statistics.median(gaps),
        "itl_p99_s": percentile(gaps, 0.99),
        "gap_s": max(gaps),
        "ttft_s": answer.ttft_s,
    }


def _table(name: str, what: str, entries: list[dict[str, object]]) -> str:
    """Format medians over the starts. Later answers of a start count as their median; ratios are within a start."""
    lines = [f"\n{name}, {what}: {len(entries)} starts, the median of each", "| | first | later | first to later |",
             "|---|---|---|---|"]  # fmt: skip
    for key, (title, scale, digits) in _SHOWN.items():
        pairs = [(entry["first"][key], statistics.median(r[key] for r in entry["later"])) for entry in entries]  # type: ignore
        first, later = (statistics.median(values) * scale for values in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        judged = {"tokens_per_s": 1 / ratio, "itl_p99_s": ratio}.get(key) if what == "text" else None
        goal = "" if judged is None else f" (goal {'met' if judged <= _ALLOWED else 'missed'}: within 15 %)"
        lines.append(f"| {title} | {first:,.{digits}f} | {later:,.{digits}f} | {ratio:.2f}{goal} |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.first", description=__doc__)
    parser.add_argument("--server", action="append", metavar="NAME=COMMAND", help="several may be given")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--later", type=int, default=4, help="answers behind the first")
    parser.add_argument("--words", type=int, default=30, help="of the prompt: about as many tokens")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--schemas", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.server = options.server or ["tokenmill=tokenmill serve"]
    return options


if __name__ == "__main__":
    main()
