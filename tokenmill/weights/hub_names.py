"""Parse names of models on the Hub as users write them: ids, ids with a file, and URLs copied from a browser."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote

from tokenmill.errors import DownloadError

_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?", re.A)
_WANTED = re.compile(r"[\w.\-+]+(/[\w.\-+]+)*", re.A)
_HOST = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/+|hf://+(models/)?")
_VIEWS = ("tree", "blob", "resolve", "raw", "commit")


class HubName(NamedTuple):
    """Repository, with an optional revision and file ("" for none)."""

    repo: str
    revision: str = ""
    wanted: str = ""  # name of a GGUF file, or a part of it

    def __str__(self) -> str:
        return f"{self.repo}:{self.wanted}" if self.wanted else self.repo


def clean(value: str) -> str:
    """Strip the white space and quotes that env files may leave around a value."""
    return value.strip().strip("'\"").strip()


def parse(text: str, endpoint: str = "") -> HubName | None:
    """Parse `owner/name`, `owner/name:Q4_K_M`, `owner/name/file.gguf` or a URL of the Hub; None for anything else.

    `endpoint`: address of a mirror, whose URLs are parsed like the Hub's; "" for none.
    """
    text = clean(text)
    mirror = endpoint.rstrip("/") + "/"
    host = _HOST.match(text)
    if endpoint and text.startswith(mirror):
        return _address(text.removeprefix(mirror))
    if host:
        return _address(text[host.end() :])
    repo, colon, wanted = text.rstrip("/").partition(":")
    if colon and not wanted:
        return None
    return _checked(HubName(repo, "", wanted))


def named(text: str, endpoint: str = "") -> HubName:
    """As `parse`, but raise DownloadError with the allowed forms instead of returning None."""
    found = parse(text, endpoint)
    if found is None:
        what = "folder or file that exists here nor an id on the Hub (owner/name, or owner/name:Q4_K_M for a GGUF file)"
        raise DownloadError(f"Model {text!r} is neither a {what}.")
    return found


def _address(rest: str) -> HubName | None:
    """Parse the path of a page: owner/name, optionally followed by /tree/revision or /blob/revision/file."""
    rest, colon, wanted = re.split("[?#]", rest, maxsplit=1)[0].strip("/").partition(":")
    parts = [unquote(part) for part in rest.split("/")]
    at = next((i for i in (1, 2) if len(parts) > i and parts[i] in _VIEWS), len(parts))
    repo, view = parts[:at], parts[at + 1 :]
    if not view and len(repo) > 2:
        return _checked(HubName("/".join(repo), "", wanted)) if not colon else None
    revision = "" if not view or view[0] == "main" else view[0]
    file = "/".join(view[1:])
    if file and not file.lower().endswith(".gguf"):
        file = ""  # the page of a file that is not a GGUF file stands for the model
    return _checked(HubName("/".join(repo), revision, wanted or file))


def _checked(name: HubName) -> HubName | None:
    owner_and_name, rest = name.repo.split("/")[:2], name.repo.split("/")[2:]
    if rest and (name.wanted or not rest[-1].lower().endswith(".gguf")):
        return None
    found = HubName("/".join(owner_and_name), name.revision, name.wanted or "/".join(rest))
    if not _ID.fullmatch(found.repo) or ".." in found.repo or owner_and_name[0] in ("datasets", "spaces"):
        return None
    if found.wanted and (not _WANTED.fullmatch(found.wanted) or ".." in found.wanted):
        return None
    return found
