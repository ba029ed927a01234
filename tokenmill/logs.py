"""Set up logging, once per process: text or JSON lines on stdout, in TGI's formats.

A caller may add machine-readable fields and the span that a line belongs to:
`logger.info("Success", extra={"span": {"name": "generate", "total_time": "1.2s"}})`.
"""

from __future__ import annotations

import json as jsonlib
import logging
import sys
from datetime import UTC, datetime
from typing import Any

OFF = logging.CRITICAL + 10
LEVELS = {"trace": logging.DEBUG, "debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING,
          "warning": logging.WARNING, "error": logging.ERROR, "off": OFF}  # fmt: skip
"""Name in TGI's LOG_LEVEL -> Python's level"""
_OURS = ("tokenmill", "text_generation_launcher", "text_generation_router", "text_generation_server")
_NAMES = {logging.WARNING: "WARN", logging.CRITICAL: "ERROR"}
_COLORS = {logging.DEBUG: "34", logging.INFO: "32", logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31"}


def parse_levels(text: str) -> tuple[dict[str, int], list[str]]:
    """Parse LOG_LEVEL to levels by logger ("" is the root), and the parts that cannot be parsed.

    A level alone applies to this package's lines, as in TGI; libraries stay at info. A part `target=level` applies to
    that target. TGI's own crates stand for this package.
    """
    levels = {"": logging.INFO, "tokenmill": logging.INFO}
    wrong: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        target, equals, word = part.rpartition("=")
        level = LEVELS.get(word.strip().lower())
        if level is None or (equals and not target):
            wrong.append(part)
        elif not equals:
            levels |= {"": max(level, logging.INFO), "tokenmill": level}
        else:
            levels[_logger_of(target.partition("[")[0])] = level
    return levels, wrong


def level_of(text: str) -> int:
    """Return the level that LOG_LEVEL sets for this package's lines."""
    return parse_levels(text)[0]["tokenmill"]


def _logger_of(target: str) -> str:
    first, _, rest = target.strip().replace("::", ".").partition(".")
    return "tokenmill" if first in _OURS and (first != "tokenmill" or not rest) else target.strip().replace("::", ".")


class TextFormatter(logging.Formatter):
    """Formatter of text lines: `2025-01-31T12:00:00.000000Z  INFO tokenmill.launcher: message key=value`.

    Lines of a span, such as "Success", have the form
    `…  INFO generate{total_time="1.2s"}: tokenmill.server.access: FILE:LINE: message`.
    """

    def __init__(self, process: str, *, colors: bool = False) -> None:
        super().__init__()
        self._process = f" [{process}]" if process else ""
        self._colors = colors

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line, or as several if it has a traceback."""
        fields = "".join(f" {key}={_plain(value)}" for key, value in fields_of(record).items())
        span = span_of(record)
        context = f" {_span_text(span)}:" if span else ""
        where = f"{record.name}: {_file_of(record)}:{record.lineno}" if span else record.name
        head, level = _time(record), f"{_level(record):>5}"
        if self._colors:
            head, where = f"\033[2m{head}\033[0m", f"\033[2m{where}:\033[0m"
            level = f"\033[{_COLORS.get(record.levelno, '0')}m{level}\033[0m"
        else:
            where += ":"
        line = f"{head} {level}{self._process}{context} {where} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """Formatter of JSON lines, one object each, in the form of TGI's `--json-output`.

    `flat`: True for the form of TGI's router, with message and fields at the top level; False for that of its launcher,
    with both under `fields`. `ascii_only`: True to escape other characters.
    """

    def __init__(self, process: str, *, flat: bool = False, ascii_only: bool = False) -> None:
        super().__init__()
        self._process, self._flat, self._ascii_only = process, flat, ascii_only

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as `{"timestamp", "level", "message", …, "target", "filename", "line_number", "span", …}`."""
        fields: dict[str, Any] = {"message": record.getMessage(), **fields_of(record)}
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        line: dict[str, Any] = {"timestamp": _time(record), "level": _level(record)}
        line |= fields if self._flat else {"fields": fields}
        line |= {"target": record.name, "filename": _file_of(record), "line_number": record.lineno}
        span = span_of(record)
        if span:
            line |= {"span": span, "spans": [span]}
        if self._process:
            line["process"] = self._process
        return jsonlib.dumps(line, ensure_ascii=self._ascii_only, default=str, separators=(",", ":"))


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields that the caller passed as `extra={"fields": …}`."""
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


def span_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the span that the caller passed as `extra={"span": …}`: its fields, and its `name`."""
    span = getattr(record, "span", None)
    return span if isinstance(span, dict) else {}


def set_up(level: str = "info", *, json: bool = False, process: str = "", flat: bool = False,
           colors: bool | None = None) -> None:  # fmt: skip
    """Send this process's log to stdout. A later call replaces the configuration of an earlier one.

    `colors`: None for colours only if stdout is a terminal. `flat`: see `JsonFormatter`.
    """
    handler = logging.StreamHandler(sys.stdout)
    colors = sys.stdout.isatty() if colors is None else colors
    ascii_only = (sys.stdout.encoding or "utf-8").lower() not in ("utf-8", "utf8")
    shape = JsonFormatter(process, flat=flat, ascii_only=ascii_only) if json else TextFormatter(process, colors=colors)
    handler.setFormatter(shape)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    for noisy in ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "filelock", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for name, wanted in parse_levels(level)[0].items():
        logging.getLogger(name).setLevel(wanted)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _level(record: logging.LogRecord) -> str:
    return _NAMES.get(record.levelno, record.levelname)


def _file_of(record: logging.LogRecord) -> str:
    """Return the source file relative to the package's parent folder, so that no local path is logged."""
    folder = record.name.rpartition(".")[0].replace(".", "/")
    return f"{folder}/{record.filename}" if folder.startswith("tokenmill") else record.filename


def _span_text(span: dict[str, Any]) -> str:
    """Format a span as TGI does: `generate{parameters=… total_time="1.2s"}`. Values in debug form are not quoted."""
    words = []
    for key, value in span.items():
        if key != "name":
            words.append(f"{key}={value if key == 'parameters' else _plain(value)}")
    return f"{span.get('name', '')}{{{' '.join(words)}}}"


def _plain(value: Any) -> str:
    return jsonlib.dumps(value, ensure_ascii=False, default=str) if isinstance(value, str) else str(value)
