"""`tokenmill doctor`: a finding for each thing that a start depends on, the cure where something is in the way."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from tokenmill import cli, extras
from tokenmill.backends.cpu import isa
from tokenmill.config import Settings
from tokenmill.operate import doctor
from tokenmill.operate.doctor import Finding


def findings(*words: str, **environ: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(Settings.from_args([*words], environ))}


def test_the_processor_is_told_with_the_instruction_set_that_is_used() -> None:
    best, *others = isa.available()
    found = findings()["processor"]
    assert found.verdict == "ok"
    assert f": {best.name}" in found.text
    assert all(other.name in found.text for other in others)


def test_an_instruction_set_that_is_not_known_is_bad_and_the_known_ones_are_named() -> None:
    found = findings(TOKENMILL_ISA="sse9")["processor"]
    assert found.verdict == "bad"
    assert "'sse9' is no instruction set" in found.text
    assert "Known: avx512bf16, avx512vnni, avxvnni, avx2, neon" in found.text


def test_an_instruction_set_that_the_machine_lacks_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "features", lambda: frozenset({"avx2", "fma", "f16c"}))
    assert findings()["processor"].text.endswith(": avx2")
    found = findings(TOKENMILL_ISA="avx512vnni")["processor"]
    assert found.verdict == "bad"
    assert "which this machine lacks. It has: avx2" in found.text


def test_a_kernel_cache_that_cannot_be_written_to_is_noted_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = findings("--kernel-cache", str(tmp_path / "file" / "kernels"))["kernel cache"]
    assert found.verdict == "note"
    assert "compiled at every start" in found.text
    assert "--kernel-cache" in found.text


def test_a_port_in_use_is_noted() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        found = findings("--hostname", "127.0.0.1", "--port", str(other.getsockname()[1]))["port"]
    assert found.verdict == "note"
    assert "in use by another process" in found.text


def test_a_bad_finding_is_exit_code_1_and_hides_no_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_ISA", "sse9")
    assert cli.main(["doctor", "--port", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("bad   processor")
    assert any(line.startswith("ok    memory") for line in lines)


def test_the_embedded_model_is_run_by_the_cpu_backend_and_each_operation_has_its_kernels(embedded_model: Path) -> None:
    found = findings("--cpu-threads", "1")["backend"]
    assert found.verdict == "ok"
    assert found.text.startswith("cpu, 1 thread of ")
    kernels = dict(line.split(maxsplit=1) for line in found.details)
    assert kernels["Embed"] == "embed_int8"
    assert kernels["Linear"] == "linear_int4 × 120, linear_int8"  # 30 layers of qkv, o, gate and up, down; head
    assert {"Norm", "Attention", "Sample"} <= set(kernels)


def test_what_the_cpu_backend_lacks_is_named_with_the_backend_that_is_taken(
    embedded_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "has_torch", lambda: True)
    found = findings("--block-size", "7")["backend"]
    assert found.verdict == "note"
    assert re.match(r"torch, weights .* because the CPU backend cannot serve this: .* not 7$", found.text)
    assert findings("--block-size", "7", "--backend", "cpu")["backend"].verdict == "bad"
    assert findings("--backend", "torch")["backend"].verdict == "ok"


def test_what_needs_torch_is_bad_where_torch_is_absent(embedded_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "has_torch", lambda: False)
    found = findings("--num-shard", "2")["backend"]
    assert found.verdict == "bad"
    assert "needs torch, which is not installed" in found.text


def test_too_little_memory_is_bad_with_both_numbers(embedded_model: Path) -> None:
    found = findings("--memory-limit", "20MB")["backend"]
    assert found.verdict == "bad"
    assert "weights need 92.1 MiB, but 19.1 MiB" in found.text


def test_a_model_that_is_not_here_is_noted() -> None:
    found = findings("--model-id", "nobody/nothing")
    assert found["model"].verdict == "note"
    assert found["backend"].verdict == "note"
