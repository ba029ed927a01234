"""Answers of several servers as one: the lists of their models, and their metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from tokenmill.server.failures import NotFound


def models(answers: Iterable[tuple[str, bytes]]) -> bytes:
    """Return one list of models from the answers of `/v1/models`, with each model under the name that comes with it."""
    return msgspec.json.encode({"object": "list", "data": list(_models(answers))})


def model(answers: Iterable[tuple[str, bytes]], name: str) -> bytes:
    """Return the model of this name, as `/v1/models/{name}` does. Raises NotFound."""
    listed = list(_models(answers))
    found = next((one for one in listed if one["id"] == name), None)
    if found is None:
        served = ", ".join(repr(one["id"]) for one in listed)
        raise NotFound(f"The model {name[:200]!r} does not exist; served are {served}", "model")
    return msgspec.json.encode(found)


def _models(answers: Iterable[tuple[str, bytes]]) -> Iterator[dict[str, Any]]:
    for name, body in answers:
        for one in msgspec.json.decode(body).get("data", ()):
            yield {**one, "id": name}


def metrics(answers: Iterable[tuple[Mapping[str, str], str]]) -> str:
    """Return one text of metrics from several, in Prometheus' format. Each text's labels are added to its samples.

    All samples of a metric must follow each other, below its description.
    """
    descriptions: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for labels, text in answers:
        pairs = ",".join(f'{name}="{value}"' for name, value in labels.items())
        name = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                descriptions.setdefault(name, [line])
                samples.setdefault(name, [])
            elif line.startswith("#"):
                if len(descriptions[name]) == 1:
                    descriptions[name].append(line)
            elif line:
                samples[name].append(_labelled(line, pairs))
    return "".join("\n".join([*lines, *samples[name]]) + "\n" for name, lines in descriptions.items())


def _labelled(line: str, pairs: str) -> str:
    """Return a sample with further labels, which come first."""
    name, space, value = line.rpartition(" ")
    metric, brace, labels = name.partition("{")
    return f"{metric}{{{pairs},{labels}{space}{value}" if brace else f"{metric}{{{pairs}}}{space}{value}"
