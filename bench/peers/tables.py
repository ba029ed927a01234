"""Format the tables of measurement files, with each server's best pass: `python -m bench.peers.tables FILE…`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_SHOWN = {
    "decode_tokens_per_s": ("decode tok/s", 1.0, 0),
    "tokens_per_s": ("tok/s", 1.0, 0),
    "prefill_tokens_per_s": ("prefill tok/s", 1.0, 0),
    "ttft_p50_s": ("TTFT p50 ms", 1e3, 0),
    "itl_p50_s": ("ITL p50 ms", 1e3, 1),
    "itl_p99_s": ("p99 ms", 1e3, 1),
    "arrival_ttft_p50_s": ("TTFT of an arrival ms", 1e3, 0),
    "quiet_p50_s": ("ITL p50 quiet ms", 1e3, 1),
    "quiet_p99_s": ("p99 quiet ms", 1e3, 1),
    "gaps_p50_s": ("ITL p50 during arrivals ms", 1e3, 1),
    "gaps_p99_s": ("p99 during arrivals ms", 1e3, 1),
    "greedy_tokens_per_s": ("greedy tok/s", 1.0, 0),
    "sampled_tokens_per_s": ("sampled tok/s", 1.0, 0),
    "http_tokens_per_s": ("through HTTP tok/s", 1.0, 0),
    "in_process_tokens_per_s": ("in process tok/s", 1.0, 0),
    "cost": ("cost %", 1e2, 1),
    "start_s": ("start s", 1.0, 2),
    "rss_mb": ("RSS MB", 1.0, 0),
}
_LEADING = (
    "prefill_tokens_per_s",
    "arrival_ttft_p50_s",
    "http_tokens_per_s",
    "sampled_tokens_per_s",
    "decode_tokens_per_s",
)
_LOWER_IS_BETTER = ("arrival_ttft_p50_s",)


def document(record: Record) -> str:
    """Format the summary, a table per row, and the ratios of each of our servers to the peers."""
    names = list(dict.fromkeys(entry["row"] for entry in record["rows"]))
    parts = [summary(record), *(_row(record, name) for name in names)]
    parts += [table for ours in _ours(record) if (table := _ratios(record, ours, names))]
    return "\n\n".join(parts)


def summary(record: Record) -> str:
    """Format one line per row: each server's leading figure in its best pass."""
    columns = servers(record)
    lines = []
    for name in dict.fromkeys(entry["row"] for entry in record["rows"]):
        found = [best(record, name, server) for server in columns]
        if key := next((leading(figures) for figures in found if figures), ""):
            title = "" if name.startswith("streams") else f", {_SHOWN[key][0]}"
            cells = [_cell(figures, key) if figures else "" for figures in found]
            lines.append(f"| {name}{title} | " + " | ".join(cells) + " |")
    return "\n".join(["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|", *lines])


def short(figures: dict[str, float]) -> str:
    """Format the most important figures in one line."""
    return ", ".join(f"{title} {_cell(figures, key)}" for key, (title, _, _) in _SHOWN.items() if key in figures)


def best(record: Record, row: str, server: str) -> dict[str, float] | None:
    """Return the best pass by the row's leading figure; None if the row was not measured."""
    found = [e["figures"] for e in record["rows"] if e["row"] == row and e["server"] == server]
    if not found:
        return None
    key = leading(found[0])
    return min(found, key=lambda f: f[key] if key in _LOWER_IS_BETTER else -f[key])


def leading(figures: dict[str, float]) -> str:
    """Return the name of the figure by which a row is compared."""
    return next(key for key in _LEADING if key in figures)


def servers(record: Record) -> list[str]:
    """Return the names of all servers, ours first."""
    return list(dict.fromkeys([*_ours(record), *sorted(e["server"] for e in record["rows"])]))


def ratio(record: Record, row: str, ours: str, peer: str) -> list[float]:
    """Return our ratio to the peer by the leading figure, one per pass; above 1, ours is better."""
    passes = sorted({e["pass"] for e in record["rows"]})
    found = []
    for number in passes:
        mine, other = ({e["server"]: e["figures"] for e in record["rows"] if (e["row"], e["pass"]) == (row, number)}
                       .get(name) for name in (ours, peer))  # fmt: skip
        if mine and other and other[leading(other)] and mine[leading(mine)]:
            key = leading(mine)
            quotient = mine[key] / other[key]
            found.append(1 / quotient if key in _LOWER_IS_BETTER else quotient)
    return found


def _ours(record: Record) -> list[str]:
    return [given.partition("=")[0] for given in record["servers"]]


def _row(record: Record, name: str) -> str:
    lines = {server: figures for server in servers(record) if (figures := best(record, name, server))}
    keys = [key for key in _SHOWN if any(key in figures for figures in lines.values())]
    head = f"| {name} | " + " | ".join(_SHOWN[key][0] for key in keys) + " |\n" + "|---" * (len(keys) + 1) + "|"
    body = [f"| {server} | " + " | ".join(_cell(f, key) for key in keys) + " |" for server, f in lines.items()]
    return "\n".join([head, *body])


def _cell(figures: dict[str, float], key: str) -> str:
    _, scale, digits = _SHOWN[key]
    return f"{figures[key] * scale:,.{digits}f}" if key in figures else ""


def _ratios(record: Record, ours: str, names: list[str]) -> str:
    peers = [server for server in servers(record) if server not in _ours(record)]
    body = []
    for name in names:
        cells = [ratio(record, name, ours, peer) for peer in peers]
        if any(cells):
            body.append(f"| {name} | " + " | ".join(" / ".join(f"{r:.2f}" for r in cell) for cell in cells) + " |")
    if not body:
        return ""
    head = f"| {ours} to the peer, each pass | " + " | ".join(peers) + " |\n" + "|---" * (len(peers) + 1) + "|"
    return "\n".join([head, *body])


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print(document(json.loads(Path(file).read_text())), end="\n\n")
