"""Refuse docstrings that begin with a word that hides the subject: `scripts/docstrings.py [FOLDER …]`.

A docstring's first sentence has a verb: an imperative for a function, a noun phrase that names the thing for a type or
a property. One that begins with the words below has neither. Prints a line each, and the number; exit code 1 if there
are any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

REFUSED = ("Of", "What", "Who", "Whose", "Those", "They", "Whether", "How")
ROOT = Path(__file__).resolve().parents[1]


def refused(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and first words of each docstring of `source` that begins with a refused word."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node) or ""
        first = docstring.split(maxsplit=1)[0].rstrip(",.:;'s") if docstring.split() else ""
        if first in REFUSED or (docstring.split(maxsplit=1)[:1] and docstring.split()[0].split("'")[0] in REFUSED):
            yield node.body[0].lineno, docstring.splitlines()[0][:80]


def main(folders: list[str]) -> int:
    """Print the refused docstrings below `folders`; the exit code."""
    found = 0
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, words in refused(path.read_text()):
                print(f"{path.relative_to(ROOT)}:{line}: {words}")
                found += 1
    if found:
        print(f"{found} docstrings begin with one of {', '.join(REFUSED)}.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["tokenmill", "bench", "scripts", "tests"]))
