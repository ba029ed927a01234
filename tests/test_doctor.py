"""`tokenmill doctor`: a finding for each requirement of a start, with the remedy if it is not met."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tokenmill import cli, extras
from tokenmill.backends.cpu import isa
from tokenmill.backends.cuda import detect
from tokenmill.config import Settings
from tokenmill.models.base import program_of
from tokenmill.operate import doctor
from tokenmill.operate.doctor import Finding
from tokenmill.program.cost import weights_of
from tokenmill.runtime import assembly


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
    assert re.match(r"torch, float32, weights .* because the CPU backend cannot serve this: .* not 7$", found.text)
    assert findings("--block-size", "7", "--backend", "cpu")["backend"].verdict == "bad"
    assert findings("--backend", "torch")["backend"].verdict == "ok"


def test_what_needs_torch_is_bad_where_torch_is_absent(embedded_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "has_torch", lambda: False)
    found = findings("--block-size", "7")["backend"]
    assert found.verdict == "bad"
    assert "needs torch, which is not installed" in found.text


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """Write a model that the CUDA backend supports."""
    pytest.importorskip("triton")
    config = {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 96,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "torch_dtype": "bfloat16",
    }  # fmt: skip
    made = {
        part.name: np.zeros((part.rows, weight.columns) if weight.columns else part.rows, np.float32)
        for weight in weights_of(program_of(config))
        for part in weight.parts
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(made, tmp_path / "model.safetensors")
    return str(tmp_path)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Return a machine with a GPU, as far as it is examined."""
    monkeypatch.setattr(detect, "missing", lambda: "")
    monkeypatch.setattr(detect, "device_name", lambda index=0: "Some GPU")
    monkeypatch.setattr(detect, "capability", lambda index=0: (9, 0))
    monkeypatch.setattr(detect, "not_compilable", lambda: "")
    monkeypatch.setattr(assembly, "free_bytes", lambda choice, options, share=None: 80 << 30)


def test_on_a_gpu_each_operation_has_its_kernels_and_each_rule_its_reason(tiny: str, gpu: None) -> None:
    found = findings("--model-id", tiny)["backend"]
    assert found.verdict == "ok"
    assert found.text.startswith("cuda, Some GPU (compute capability 9.0), bfloat16, weights ")
    told = {line[:13].strip(): line[13:].strip() for line in found.details}
    assert told["Linear"] == (
        "one_row at 1 row, few_rows up to 32, cuBLAS above × 7, one_row at 1 row, few_rows above × 2"
    )
    assert told["GatedAct"] == "in the product × 2"
    assert told["Attention"].startswith("single tokens decode (split 32 up to 4 rows, ")
    assert told["Attention"].endswith("runs attend_tiles; heads of 64 with rope × 2")
    assert told["attention"].startswith("triton")
    assert told["KV cache"] == "bfloat16"
    assert told["deterministic"].startswith("no")


def test_what_triton_compiles_with_is_looked_for_and_the_cure_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install gcc or clang" in detect.not_compilable()
    for name in ("gcc", "clang"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        monkeypatch.setattr(detect.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
        assert "install python3" in detect.not_compilable()
        (tmp_path / "none").mkdir(exist_ok=True)
        (tmp_path / "none" / "Python.h").write_text("")
        assert detect.not_compilable() == ""
        (tmp_path / name).unlink()
        (tmp_path / "none" / "Python.h").unlink()


def test_a_gpu_that_cannot_be_compiled_for_is_noted(tiny: str, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "not_compilable", lambda: "no C compiler is on PATH")
    found = findings("--model-id", tiny)["backend"]
    assert found.verdict == "note"
    assert found.text.endswith("; no C compiler is on PATH")
    assert found.details


@pytest.mark.skipif(not detect.missing(), reason="there is a GPU")
def test_without_a_gpu_that_was_asked_for_it_is_bad_and_what_would_serve_there_is_told(tiny: str) -> None:
    found = findings("--model-id", tiny, "--device", "cuda")["backend"]
    assert found.verdict == "bad"
    assert "'cuda' is not supported" in found.text
    assert found.details[0] == "Where there is one, it would be:"
    assert any("few_rows above" in line for line in found.details)
    assert findings("--model-id", tiny)["backend"].verdict != "bad"


def test_a_cache_that_a_cpu_has_not_is_bad_and_the_cure_is_named(tiny: str) -> None:
    found = findings("--model-id", tiny, "--device", "cpu", "--kv-cache-dtype", "fp8_e5m2")["backend"]
    assert found.verdict == "bad"
    assert "Supported: int8." in found.text
    assert "Give `--kv-cache-dtype int8`, or none." in found.text


def test_weights_that_lack_a_tensor_are_bad_and_it_is_named(tiny: str) -> None:
    save_file({"model.norm.weight": np.zeros(128, np.float32)}, Path(tiny) / "model.safetensors")
    found = findings("--model-id", tiny)["backend"]
    assert found.verdict == "bad"
    assert "no tensor 'model.embed_tokens.weight'" in found.text


def test_too_little_memory_is_bad_with_both_numbers(embedded_model: Path) -> None:
    found = findings("--memory-limit", "20MB")["backend"]
    assert found.verdict == "bad"
    assert "weights need 92.1 MiB, but 19.1 MiB" in found.text


def test_a_model_that_is_not_here_is_noted() -> None:
    found = findings("--model-id", "nobody/nothing")
    assert found["model"].verdict == "note"
    assert found["backend"].verdict == "note"


@pytest.mark.parametrize("words, text", [
    ([], "1 engine of 1 rank on 8 of 8 usable CPUs each"),
    (["--num-shard", "2", "--data-parallel-size", "2"], "2 engines of 2 ranks on 2 of 8 usable CPUs each"),
    (["--pipeline-parallel-size", "4", "--cpu-threads", "1"], "1 engine of 4 ranks on 1 of 8 usable CPUs each"),
])  # fmt: skip
def test_the_ranks_are_told_with_their_part_of_the_cpus(
    words: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("host", "operate.doctor", "runtime.worker"):
        monkeypatch.setattr(f"tokenmill.{module}.usable_cpus", lambda: 8)
    found = findings("--device", "cpu", *words)["ranks"]
    assert (found.verdict, found.text) == ("ok", text)


def test_the_ranks_are_told_with_their_devices_and_too_few_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "missing", lambda: "")
    monkeypatch.setattr(detect, "num_devices", lambda: 2)
    monkeypatch.setattr(doctor, "_LOOKS", {"ranks": doctor._ranks})
    assert findings("--num-shard", "2")["ranks"].text == "1 engine of 2 ranks on 2 of 2 visible devices"
    shared = findings("--num-shard", "3", "--share-devices")["ranks"]
    assert shared.text == "1 engine of 3 ranks on 2 of 2 visible devices; up to 2 ranks share one"
    found = findings("--num-shard", "3")["ranks"]
    assert found.verdict == "bad"
    assert "3 ranks need as many devices, but 2 of them are visible" in found.text
