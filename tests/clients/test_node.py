"""Node's clients (openai, @huggingface/inference, Vercel's AI SDK): each file of `node/`, run by `node --test`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "node"
FILES = sorted(path.name for path in FOLDER.glob("*.test.mjs"))


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
@pytest.mark.skipif(not (FOLDER / "node_modules").is_dir(), reason="run `npm ci` in tests/clients/node")
@pytest.mark.parametrize("name", FILES)
def test_node(url: str, name: str) -> None:
    done = subprocess.run(
        ["node", "--test", "--test-reporter=spec", name],
        cwd=FOLDER,
        env=os.environ | {"BASE_URL": url, "AI_SDK_LOG_WARNINGS": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
