"""Reads the small files beside a model, and the forms in which they write tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from tokenmill import jsontext
from tokenmill.errors import ModelError
from tokenmill.weights.source import refuse_pointer


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; {} if there is no such file. Raises ModelError for anything else."""
    if not path.is_file():
        return {}
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        why = jsontext.fault(text.encode(), sys.maxsize) or "it cannot be read"
        raise ModelError(f"{path} is not valid JSON: {why}. Download the file again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def read_text(path: Path) -> str:
    """Return a file's content. Raises ModelError if it cannot be read, is not UTF-8, or is a Git LFS pointer."""
    refuse_pointer(path)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e}.") from None
    except UnicodeDecodeError as e:
        raise ModelError(f"{path} is not UTF-8: byte {e.start} cannot stand there. Download the file again.") from None


def content_of(token: Any) -> str | None:
    """Return the text of a token, which is written as text or as an object with its properties."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def added_token(token: Any) -> AddedToken:
    """Return a token for `tokenizers`; one that is written as text alone is not special."""
    if isinstance(token, str):
        return AddedToken(token, special=False, normalized=False)
    flags = {
        name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
    }
    return AddedToken(content_of(token) or "", **flags)
