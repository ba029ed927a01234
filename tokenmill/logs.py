"""Logging, set up once at the top of a process: text or JSON lines on stdout, with the process's name.

A caller may add fields that tools read: `logger.info("Success", extra={"fields": {"total_time": "1.2s"}})`.
"""

from __future__ import annotations

import json as jsonlib
import logging
import sys
from datetime import UTC, datetime
from typing import Any

LEVELS = {"trace": logging.DEBUG, "debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING,
          "warning": logging.WARNING, "error": logging.ERROR, "off": logging.CRITICAL}  # fmt: skip
"""Names of TGI's LOG_LEVEL, and Python's levels."""


def level_of(text: str) -> int:
    """The level that LOG_LEVEL names. Of a filter like "info,tokio=warn" the part without a target counts."""
    plain = [part for part in text.lower().split(",") if "=" not in part]
    return LEVELS.get(plain[0].strip() if plain else "", logging.INFO)


class TextFormatter(logging.Formatter):
    """`2025-01-31T12:00:00.000000Z  INFO tokenmill.server.app: message key=value`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = f" [{process}]" if process else ""

    def format(self, record: logging.LogRecord) -> str:
        """One line, or more if there is a traceback."""
        fields = "".join(f" {key}={_plain(value)}" for key, value in fields_of(record).items())
        line = f"{_time(record)} {record.levelname:>5}{self._process} {record.name}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in the shape of TGI's `--json-output`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """`{"timestamp", "level", "fields": {"message", …}, "target"}`."""
        fields: dict[str, Any] = {"message": record.getMessage(), **fields_of(record)}
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        line: dict[str, Any] = {"timestamp": _time(record), "level": record.levelname, "fields": fields,
                                "target": record.name}  # fmt: skip
        if self._process:
            line["process"] = self._process
        return jsonlib.dumps(line, ensure_ascii=False, default=str)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as `extra={"fields": …}`."""
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


def set_up(level: str = "info", *, json: bool = False, process: str = "") -> None:
    """Send this process's log to stdout. Calling it again replaces what an earlier call set up."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter(process) if json else TextFormatter(process))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(level_of(level), logging.INFO))  # TGI's rule: debug is for our own lines, not for libraries'
    logging.getLogger("tokenmill").setLevel(level_of(level))
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _plain(value: Any) -> str:
    return jsonlib.dumps(value, ensure_ascii=False, default=str) if isinstance(value, str) else str(value)
