"""Describe the machine of a run, for its record and its table."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from importlib import metadata
from typing import Any


def machine() -> dict[str, Any]:
    """Return cards, driver, versions and cores, without importing torch or using a card."""
    rows = _smi("name,driver_version,memory.total")
    versions = {}
    for name in ("torch", "triton", "transformers", "tokenizers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "cards": [row[0] for row in rows], "driver": rows[0][1] if rows else "", "memory": rows[0][2] if rows else "",
        "versions": versions, "python": platform.python_version(), "cpus": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


def visible() -> list[str]:
    """Return the usable cards, named as in CUDA_VISIBLE_DEVICES."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(i) for i in range(len(_smi("name")))]


def wait_until_free(card: str, most_mib: int = 3000, timeout_s: float = 20.0) -> None:
    """Wait until a card's memory is free, for `timeout_s` seconds at most. Returns at once without a card."""
    until = time.monotonic() + timeout_s
    while card and time.monotonic() < until:
        rows = _smi("memory.used", card)
        if not rows or int(rows[0][0].split()[0]) <= most_mib:
            return
        time.sleep(0.5)


def _smi(fields: str, card: str = "") -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", *(["-i", card] if card else [])]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
