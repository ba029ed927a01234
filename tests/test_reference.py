"""docs/reference matches the code, and has no broken links."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmill import options
from tokenmill.config import Settings
from tokenmill.server.metrics import CATALOG
from tokenmill.server.openapi import document
from tokenmill.server.routes.table import ROUTES

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"


@pytest.mark.parametrize("page", ["cli", "http-api"])
def test_the_pages_of_the_reference_are_current(page: str) -> None:
    command = [sys.executable, "-m", "tokenmill", "schema", page]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    path = FOLDER / f"{page}.md"
    assert made == path.read_text(), f"make it anew: tokenmill schema {page} > docs/reference/{page}.md"


def test_every_option_route_and_metric_is_in_the_reference() -> None:
    cli, http_api = (FOLDER / "cli.md").read_text(), (FOLDER / "http-api.md").read_text()
    for field in options.fields_of(Settings):
        for name in field.variables if field.option.env_only else (field.flag, *field.variables):
            assert f"`{name}`" in cli
    for path, methods in document(ROUTES)["paths"].items():
        for method in methods:
            assert f"| `{method.upper()} {path}` |" in http_api
    for metric in CATALOG:
        assert f"`{metric.name}`" in http_api


def test_every_header_of_an_answer_is_in_the_reference() -> None:
    text = (FOLDER / "http-api.md").read_text()
    source = (FOLDER.parent.parent / "tokenmill" / "server" / "answering.py").read_text()
    sent = set(re.findall(r'b"(x-[a-z-]+)"', source))
    assert len(sent) > 10
    assert all(f"| `{name}` |" in text for name in sent)


def test_links_within_the_page_lead_somewhere() -> None:
    text = (FOLDER / "http-api.md").read_text()
    headings = {line.removeprefix("### ").lower() for line in text.splitlines() if line.startswith("### ")}
    assert set(re.findall(r"\(#([a-z0-9_-]+)\)", text)) <= headings
