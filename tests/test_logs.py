"""Log lines: text for people, JSON in TGI's shape for machines."""

from __future__ import annotations

import json
import logging
import re
import sys

import pytest

from tokenmill import logs
from tokenmill.logs import OFF, JsonFormatter, TextFormatter, level_of, parse_levels


def record(message: str, *words: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("tokenmill.server.app", logging.INFO, "app.py", 1, message, words, None)
    made.__dict__.update(extra)
    return made


def test_a_text_line_has_time_level_process_place_message_and_fields() -> None:
    line = TextFormatter("server 0").format(record("Success %d", 7, fields={"total_time": "1.2s", "n": 3}))
    when = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
    assert re.fullmatch(when + r'  INFO \[server 0\] tokenmill\.server\.app: Success 7 total_time="1\.2s" n=3', line)


def test_a_json_line_has_the_shape_of_tgis_launcher() -> None:
    line = json.loads(JsonFormatter("").format(record('a "quoted"\nline', fields={"total_time": "1.2s"})))
    assert list(line) == ["timestamp", "level", "fields", "target", "filename", "line_number"]
    assert line["fields"] == {"message": 'a "quoted"\nline', "total_time": "1.2s"}
    assert (line["level"], line["target"]) == ("INFO", "tokenmill.server.app")


SPAN = {"name": "generate", "parameters": "GenerateParameters { seed: None }", "total_time": "1.2s", "seed": "Some(7)"}


def test_a_json_line_of_an_http_worker_has_the_shape_of_tgis_router() -> None:
    line = json.loads(JsonFormatter("", flat=True).format(record("Success", span=SPAN)))
    assert list(line) == ["timestamp", "level", "message", "target", "filename", "line_number", "span", "spans"]
    assert (line["message"], line["filename"], line["line_number"]) == ("Success", "tokenmill/server/app.py", 1)
    assert line["span"] == SPAN
    assert line["spans"] == [SPAN]


def test_a_text_line_of_a_span_has_the_shape_of_tgis_router() -> None:
    line = TextFormatter("").format(record("Success", span=SPAN))
    assert line.split(" ", 1)[1] == (
        ' INFO generate{parameters=GenerateParameters { seed: None } total_time="1.2s" seed="Some(7)"}: '
        "tokenmill.server.app: tokenmill/server/app.py:1: Success"
    )


def test_colours_are_around_time_level_and_place() -> None:
    line = TextFormatter("", colors=True).format(record("hello"))
    assert re.sub(r"\033\[\d+m", "", line).endswith("  INFO tokenmill.server.app: hello")
    assert "\033[32m INFO\033[0m" in line


def test_names_of_levels_are_those_of_tgi() -> None:
    made = record("x")
    made.levelno, made.levelname = logging.WARNING, "WARNING"
    assert " WARN tokenmill" in TextFormatter("").format(made)
    assert json.loads(JsonFormatter("").format(made))["level"] == "WARN"


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
    ("trace", logging.DEBUG), ("off", OFF), ("text_generation_router=debug,tower_http=warn", logging.DEBUG),
    ("warn,text_generation_launcher=error", logging.ERROR), ("", logging.INFO),
])  # fmt: skip
def test_levels_are_those_of_tgi(text: str, level: int) -> None:
    assert level_of(text) == level


def test_a_level_is_for_our_own_lines_and_a_filter_for_its_target() -> None:
    assert parse_levels("debug")[0] == {"": logging.INFO, "tokenmill": logging.DEBUG}
    assert parse_levels("error")[0] == {"": logging.ERROR, "tokenmill": logging.ERROR}
    levels, wrong = parse_levels("info, tokenmill.engine=debug,uvicorn=off,text_generation_router::infer=trace")
    assert levels == {"": logging.INFO, "tokenmill": logging.DEBUG, "tokenmill.engine": logging.DEBUG, "uvicorn": OFF}
    assert wrong == []


def test_what_is_not_understood_of_a_filter_is_named() -> None:
    assert parse_levels("loud,tokenmill=debug,a=b,=info")[1] == ["loud", "a=b", "=info"]
    assert parse_levels("loud")[0] == {"": logging.INFO, "tokenmill": logging.INFO}


def test_set_up_sends_what_the_filter_lets_through_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in ("", "tokenmill", "lib.x")}
    try:
        logs.set_up("warn,lib.x=debug", json=True)
        logging.getLogger("tokenmill.launcher").info("not this")
        logging.getLogger("tokenmill.launcher").warning("this")
        logging.getLogger("lib.x").debug("and this")
    finally:
        root.handlers[:] = handlers
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    lines = [json.loads(line)["fields"]["message"] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["this", "and this"]
