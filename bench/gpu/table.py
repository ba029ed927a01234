"""Format the table of a run: figures of this engine and of the peer, their ratio, and the goal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.gpu.shapes import GOALS, H200_GOALS, H200_REFERENCES, Goal

Line = dict[str, Any]
_ORDER = ("GPU tests", "decode", "prefill", "crowd", "long prompt", "ready", "HTTP")
_UNCOMPARED = ("", "cores")


def read(path: Path) -> list[Line]:
    """Read the lines of a run, without truncated ones."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def table(lines: Iterable[Line]) -> str:
    """Format the table, the machine, and the failures."""
    lines = list(lines)
    about = next((line["machine"] for line in reversed(lines) if "machine" in line), {})
    on_h200 = any("H200" in card for card in about.get("cards", []))
    rows = [_head(on_h200)]
    rows += [_row(key, values, on_h200) for key, values in _ordered(_with_shares(_figures(lines)))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = [_about(about)]
    for row in rows:
        cells = [cell.ljust(width) if i < 2 else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        text.append("| " + " | ".join(cells) + " |")
    text.insert(2, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    text += [f"failed: {line['part']}: {line['failed']}" for line in lines if "failed" in line]
    return "\n".join(text)


Key = tuple[str, str, str]  # shape, variant, figure
Figures = dict[Key, dict[str, Line]]  # by who


def _figures(lines: list[Line]) -> Figures:
    """Return the last line of each figure."""
    found: Figures = {}
    for line in lines:
        if "figure" in line:
            key = (line["shape"], line.get("variant", ""), line["figure"])
            found.setdefault(key, {})[line.get("who", "ours")] = line
    for (shape, variant, name), values in found.items():
        if variant and "peer" in (plain := found.get((shape, "", name), {})):
            values["peer"] = plain["peer"]
    return found


def _with_shares(figures: Figures) -> Figures:
    """Add the ratio of HTTP throughput to offline throughput."""
    found: Figures = {}
    for key, values in figures.items():
        found[key] = values
        shape, variant, name = key
        if not name.startswith("HTTP, ") or ":" in name:
            continue
        streams = name.removeprefix("HTTP, ").split()[0]
        for who, line in values.items():
            longest = line.get("longest", 1024)
            same = f"crowd of {streams}" + (f", up to {longest}" if longest != 1024 else "")
            offline = figures.get((shape, "", same), {}).get(who)
            if offline and offline["value"]:
                share = line | {"value": round(line["value"] / offline["value"], 3), "unit": "× offline", "less": False}
                found.setdefault((shape, variant, f"{name}: of offline"), {})[who] = share
    return found


def _ordered(figures: Figures) -> list[tuple[Key, dict[str, Line]]]:
    def place(item: tuple[int, Key]) -> tuple[Any, ...]:
        number, (shape, variant, name) = item
        group = next((i for i, word in enumerate(_ORDER) if name.startswith(word)), len(_ORDER))
        return shape, variant, group, number

    return [(key, figures[key]) for _, key in sorted(enumerate(figures), key=place)]


def _head(on_h200: bool) -> list[str]:
    return ["shape", "figure", "ours", "peer", "ratio", "goal", "", *(H200_REFERENCES if on_h200 else ())]


def _row(key: Key, values: dict[str, Line], on_h200: bool) -> list[str]:
    shape, variant, name = key
    ours, peer = values.get("ours"), values.get("peer")
    either = ours or peer
    assert either is not None
    goal = ((H200_GOALS.get(shape, {}).get(name) if on_h200 else None) or GOALS.get(shape, {}).get(name))
    references = [f"{t:,g}" if (t := table.get(shape, {}).get(name)) else "" for table in H200_REFERENCES.values()]
    unit = f", {either['unit']}" if either["unit"] else ""
    return [
        shape + (f" {variant}" if variant else ""), name + unit, _number(ours), _number(peer), _ratio(ours, peer),
        str(goal or ""), _met(goal, ours, peer), *(references if on_h200 else ()),
    ]  # fmt: skip


def _number(line: Line | None) -> str:
    return "" if line is None or line["value"] is None else f"{line['value']:,}"


def _ratio(ours: Line | None, peer: Line | None) -> str:
    """Format the ratio to the peer; above 1, this engine is better."""
    if not ours or not peer or not ours["value"] or not peer["value"] or ours["unit"] in _UNCOMPARED:
        return ""
    better = peer["value"] / ours["value"] if ours["less"] else ours["value"] / peer["value"]
    return f"{better:.2f}"


def _met(goal: Goal | None, ours: Line | None, peer: Line | None) -> str:
    if goal is None or ours is None or (goal.of_peer and not peer):
        return ""
    bound = goal.value * (peer["value"] if goal.of_peer and peer else 1)
    return "yes" if (ours["value"] <= bound if goal.less else ours["value"] >= bound) else "no"


def _about(machine: dict[str, Any]) -> str:
    if not machine:
        return "unknown machine"
    cards = ", ".join(machine["cards"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (f"{machine['date']}: {cards}, driver {machine['driver'] or 'none'}, {machine['cpus']} CPUs, {versions}. "
            "Ratio above 1: ours is better.")  # fmt: skip
