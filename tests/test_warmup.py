"""`tokenmill warmup`: compiles once and prints the folder; a later start compiles nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_cpu import kernel_folder

from tokenmill import cli


def warmup(*words: str) -> int:
    return cli.main(["warmup", *words])


def test_kernels_are_compiled_once_and_then_found(embedded_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model-id", str(embedded_model), "--kernel-cache", str(kernel_folder()))
    assert warmup(*words) == 0
    assert warmup(*words) == 0
    out = capsys.readouterr().out
    assert "all were there" in out
    assert str(kernel_folder()) in out


def test_a_folder_that_cannot_be_written_to_is_an_error_with_the_cure(
    embedded_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert warmup("--model-id", str(embedded_model), "--kernel-cache", str(tmp_path / "file")) == 1
    assert "cannot be written to" in (err := capsys.readouterr().err)
    assert "--kernel-cache" in err


def test_nothing_is_compiled_for_torch(embedded_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert warmup("--model-id", str(embedded_model), "--backend", "torch") == 0
    assert "served by the torch backend" in capsys.readouterr().out
