"""docs/quantization.md matches the code, and names every method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("support_cuda")  # torch and triton

from support_quant_table import page

from tokenmill.quant import _refused
from tokenmill.quant._method import stored_methods, while_loading

PATH = Path(__file__).resolve().parent.parent / "docs" / "quantization.md"


@pytest.fixture(scope="module")
def made() -> str:
    return page()


def test_the_page_of_quantization_is_current(made: str) -> None:
    command = "PYTHONPATH=.:tests python tests/support_quant_table.py > docs/quantization.md"
    assert made == PATH.read_text(), f"make it anew: {command}"


def test_the_page_names_every_method(made: str) -> None:
    stored, at_load, _, refused = made.split("\n## ")[1:]
    names = {name.replace("_", "-") for name in re.findall(r"^\| `?([\w-]+)`? \|", stored, re.M)}
    assert names == {"quant-method", *stored_methods()}
    assert re.findall(r"^\| `([\w-]+)` \|", at_load, re.M)[1:] == while_loading()
    assert set(re.findall(r"^\| `(\w+)` \|", refused, re.M)) == {"quant_method", *_refused.METHODS}
