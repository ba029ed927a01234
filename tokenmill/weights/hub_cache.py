"""Read the Hub's cache on disk, in the layout that all of the Hub's tools share. Only damaged files are removed.

models--owner--name/refs/main            the commit that a branch or tag was last seen at
models--owner--name/snapshots/COMMIT/…   files by name, links to
models--owner--name/blobs/…              their contents
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tokenmill.errors import MissingFiles
from tokenmill.weights.hub_faults import HubFault
from tokenmill.weights.source import unreadable, weights_in

_PIECE = 4 << 20  # bytes hashed at a time
_COMMIT = re.compile("[0-9a-f]{40}")
_TOKENIZER = re.compile(
    r"(tokenizer\.(json|model.*)|tekken\.json|vocab\.(json|txt)|(spiece|.*\.bpe)\.model|.*\.?tiktoken.*)"
)


@dataclass(frozen=True, slots=True)
class CachedRepository:
    """Folder of one repository in the cache. The folder need not exist."""

    root: Path
    repo: str

    @property
    def folder(self) -> Path:
        """Folder that holds the repository's files."""
        return self.root / f"models--{self.repo.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        """Return the folder of a commit's files."""
        return self.folder / "snapshots" / commit

    def commit(self, revision: str) -> str | None:
        """Return the cached commit of a branch, a tag, a commit or a prefix of one ("": main), or None."""
        revision = revision or "main"
        try:
            known = (self.folder / "refs" / revision).read_text().strip()
        except (OSError, ValueError):
            known = revision if _COMMIT.fullmatch(revision) else self._beginning(revision)
        return known if known and os.path.isdir(self.snapshot(known)) else None

    def _beginning(self, revision: str) -> str:
        found = [commit for commit in self.commits() if commit.startswith(revision)]
        return found[0] if len(found) == 1 and re.fullmatch("[0-9a-f]{7,39}", revision) else ""

    def commits(self) -> list[str]:
        """Return all commits with at least one file in the cache."""
        try:
            return sorted(path.name for path in (self.folder / "snapshots").iterdir())
        except OSError:
            return []

    def check_readable(self) -> None:
        """Raise ModelError if the repository's folder exists but is not readable."""
        for folder in (self.root, self.folder, self.folder / "snapshots"):
            try:
                with os.scandir(folder):
                    pass
            except FileNotFoundError:
                return
            except OSError as error:
                raise unreadable(folder, error) from None

    def lacking(self, commit: str, wanted: str) -> list[str]:
        """Return the names of missing files that serving needs. ModelError if a download would not help."""
        folder = self.snapshot(commit)
        missing: list[str] = []
        try:
            weights = weights_in(folder, wanted)
            if weights.format in ("gguf", "adapter"):
                return []
        except MissingFiles as error:
            missing += error.missing
        if not (folder / "config.json").is_file() and not wanted:
            missing.append("config.json")
        if not wanted and not any(_TOKENIZER.fullmatch(path.name) for path in folder.iterdir()):
            missing.append("the tokenizer")
        return list(dict.fromkeys(missing))


def incomplete(blobs: Path) -> int:
    """Return the bytes of the files that are being downloaded."""
    total = 0
    for path in blobs.glob("*.incomplete"):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # the file was completed meanwhile
    return total


def verified(downloaded: str, name: str, endpoint: str) -> Path:
    """Return the path of a file that was just downloaded, if it has the content that the Hub names.

    Otherwise remove the content and raise HubFault. The Hub names contents by their SHA-256, or small ones as git does.
    """
    path = Path(downloaded)
    blob = path.resolve()
    kind = {64: "sha256", 40: "sha1"}.get(len(blob.name)) if re.fullmatch("[0-9a-f]+", blob.name) else None
    if kind is None:  # a cache without links
        return path
    found = hashlib.new(kind, b"" if kind == "sha256" else f"blob {blob.stat().st_size}\0".encode())
    with blob.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    if found.hexdigest() == blob.name:
        return path
    blob.unlink()
    raise HubFault(
        f"{endpoint} sent {name} with a wrong content: its {kind} is {found.hexdigest()}, and should be {blob.name}. "
        "The file was removed. Is a proxy or a mirror in between?", again=True, afresh=True,
    )  # fmt: skip
