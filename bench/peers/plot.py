"""Plot a measurement file as bars of tokens per second: `python -m bench.peers.plot FILE.json FILE.svg`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from bench.peers import tables

_COLOURS = ("#d9480f", "#f08c4a", "#1971c2", "#868e96", "#ced4da", "#9775fa")
_WIDTH, _HEIGHT, _LEFT, _TOP, _FLOOR = 1100, 400, 20, 70, 340
_TITLE = "Tokens a second over all streams, decoding; prefill: prompt tokens a second"


def svg(record: tables.Record) -> str:
    """Draw one group of bars per row, each scaled to its tallest bar, as rows differ by orders of magnitude."""
    names = [n for n in dict.fromkeys(e["row"] for e in record["rows"]) if n.startswith(("streams", "prefill 512"))]
    servers = [s for s in tables.servers(record) if any(tables.best(record, n, s) for n in names)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">{escape(_TITLE)}</text>',
        *_legend(servers),
    ]
    group = (_WIDTH - 2 * _LEFT) / max(1, len(names))
    for index, name in enumerate(names):
        parts += _group(record, name, servers, _LEFT + index * group, group)
    where = f"{record['cpu']}, {record['cpus']} CPUs, {record['date']}; each group has its own scale"
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 12}" fill="#666">{escape(where)}</text></svg>')
    return "\n".join(parts) + "\n"


def _legend(servers: list[str]) -> list[str]:
    parts, x = [], _LEFT
    for colour, server in zip(_COLOURS, servers, strict=False):
        parts.append(f'<rect x="{x}" y="38" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="48">{escape(server)}</text>')
        x += 34 + 7 * len(server)
    return parts


def _group(record: tables.Record, name: str, servers: list[str], left: float, width: float) -> list[str]:
    found = {s: f[tables.leading(f)] for s in servers if (f := tables.best(record, name, s))}
    tallest, bar = max(found.values()), (width - 30) / len(servers)
    parts = []
    for place, server in enumerate(servers):
        if (value := found.get(server)) is None:
            continue
        height = (_FLOOR - _TOP - 20) * value / tallest
        x, y = left + 15 + place * bar, _FLOOR - height
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar - 3:.1f}" height="{height:.1f}" '
            f'fill="{_COLOURS[place % len(_COLOURS)]}"/>'
        )
        at = f'x="{x + bar / 2:.1f}" y="{y - 5:.1f}"'
        parts.append(f'<text {at} text-anchor="middle" font-size="10">{value:,.0f}</text>')
    parts.append(f'<text x="{left + width / 2:.1f}" y="{_FLOOR + 20}" text-anchor="middle">{escape(name)}</text>')
    return parts


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.write_text(svg(json.loads(source.read_text())))
