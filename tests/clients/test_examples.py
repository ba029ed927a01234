"""Examples that query a server run unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


@pytest.mark.parametrize(
    "name, package, route, said",
    [
        ("openai_client.py", "openai", "/v1", ["Paris", "CompletionUsage(", "'The'", "temperature: "]),
        ("structured.py", "openai", "/v1", ["City(", " °C'", "get_weather ", "days: rain", "uniqueItems"]),
        ("huggingface_client.py", "huggingface_hub", "", ["' Paris", " length", "4, 5, 6, 7, 8, 9", "`top_p`"]),
    ],
)
def test_example(url: str, name: str, package: str, route: str, said: list[str]) -> None:
    pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), url + route],
        env=os.environ | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words in said:
        assert words in done.stdout
