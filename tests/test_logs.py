"""Log lines: text for people, JSON in TGI's shape for machines."""

from __future__ import annotations

import json
import logging
import re
import sys

import pytest

from tokenmill.logs import JsonFormatter, TextFormatter, level_of


def record(message: str, *words: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("tokenmill.server.app", logging.INFO, "app.py", 1, message, words, None)
    made.__dict__.update(extra)
    return made


def test_a_text_line_has_time_level_process_place_message_and_fields() -> None:
    line = TextFormatter("server 0").format(record("Success %d", 7, fields={"total_time": "1.2s", "n": 3}))
    when = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
    assert re.fullmatch(when + r'  INFO \[server 0\] tokenmill\.server\.app: Success 7 total_time="1\.2s" n=3', line)


def test_a_json_line_has_the_shape_of_tgi() -> None:
    line = json.loads(JsonFormatter("").format(record('a "quoted"\nline', fields={"total_time": "1.2s"})))
    assert line.keys() == {"timestamp", "level", "fields", "target"}
    assert line["fields"] == {"message": 'a "quoted"\nline', "total_time": "1.2s"}
    assert (line["level"], line["target"]) == ("INFO", "tokenmill.server.app")


def test_a_traceback_follows_the_line_or_is_a_field() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        made = record("failed", exc_info=sys.exc_info())
    assert TextFormatter("").format(made).endswith("ValueError: why")
    assert "\n" not in JsonFormatter("").format(made)
    assert "ValueError: why" in json.loads(JsonFormatter("").format(made))["fields"]["error"]


@pytest.mark.parametrize("text, level", [
    ("info", logging.INFO), ("DEBUG", logging.DEBUG), ("warn", logging.WARNING), ("error", logging.ERROR),
    ("info,tokio=warn", logging.INFO), ("tokio=warn", logging.INFO), ("nonsense", logging.INFO),
])  # fmt: skip
def test_levels_are_those_of_tgi(text: str, level: int) -> None:
    assert level_of(text) == level
