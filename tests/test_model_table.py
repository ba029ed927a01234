"""docs/models.md matches the code, and names every model type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support_model_table import page

from tokenmill import plugins

PATH = Path(__file__).resolve().parent.parent / "docs" / "models.md"


@pytest.fixture(scope="module")
def made() -> str:
    return page()


def test_the_page_of_models_is_current(made: str) -> None:
    command = "PYTHONPATH=.:tests python tests/support_model_table.py > docs/models.md"
    assert made == PATH.read_text(), f"make it anew: {command}"


def test_every_model_type_has_a_family_that_is_compared_with_transformers(made: str) -> None:
    assert re.findall(r"^\| `(\w+)` ", made, re.M) == plugins.names("models")
