"""docs/models.md matches the code, and names every model type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support_model_table import NOT_HERE, WHOLE, page

from tokenmill import plugins
from tokenmill.models import base

PATH = Path(__file__).resolve().parent.parent / "docs" / "models.md"


@pytest.fixture(scope="module")
def made() -> str:
    return page()


def test_the_page_of_models_is_current(made: str) -> None:
    command = "PYTHONPATH=.:tests python tests/support_model_table.py > docs/models.md"
    assert made == PATH.read_text(), f"make it anew: {command}"


def test_every_model_type_has_a_family_that_is_compared_with_transformers(made: str) -> None:
    assert re.findall(r"^\| `(\w+)` ", made, re.M) == plugins.names("models")


def test_the_page_names_the_models_of_transformers_that_no_file_builds() -> None:
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as THEIRS

    assert not {*NOT_HERE} & {*base.names()}
    assert sorted(NOT_HERE) == NOT_HERE
    if __version__.startswith("5.24."):
        assert {*NOT_HERE, *WHOLE, *base.names()} >= {*THEIRS}
        assert {*NOT_HERE, *WHOLE} <= {*THEIRS}
