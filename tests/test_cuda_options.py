"""Options of the CUDA backend, from the user's choice to the backend's; flashinfer instead of its own attention."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support_backends import choice_of, make
from support_cpu import kernel_folder
from support_cuda import ON_GPU, altered, program, torch

from tokenmill.backends.cuda import detect, explain, prepare
from tokenmill.backends.cuda.explain import KernelOptions, kernels_of, product_of, rules_of
from tokenmill.backends.cuda.kind import KIND, attention
from tokenmill.backends.cuda.products.base import Operands, Scratch
from tokenmill.backends.cuda.products.dense import Dense
from tokenmill.backends.kind import BackendOptions
from tokenmill.errors import ArgumentError, MissingPackage, NotEnoughMemory, Unsupported
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Program
from tokenmill.runtime import assembly
from tokenmill.runtime.choice import Choice, choose
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source

HAS_FLASHINFER = ON_GPU and find_spec("flashinfer") is not None


# Choice of the backend


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a machine with a GPU as seen by `detect`. Its properties can be changed."""
    found = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(detect, "missing", lambda: "")
    monkeypatch.setattr(detect, "device_name", lambda index=0: "Some GPU")
    monkeypatch.setattr(detect, "capability", lambda index=0: found.capability)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    return found


def chosen(made: Program, ranks: int = 1, **wants: Any) -> Choice:
    return choose(made, BackendOptions(**wants), 16, ranks)


def test_an_fp8_cache_is_a_gpus_from_compute_capability_8_9_on(gpu: SimpleNamespace, tmp_path: Path) -> None:
    made = program(tmp_path)
    for name in prepare.KV_DTYPES:
        gpu.capability = (8, 9)
        assert chosen(made, kv_cache_dtype=name) == choice_of("cuda", device="cuda")
        gpu.capability = (8, 6)
        with pytest.raises(Unsupported, match=r"FP8 needs compute capability 8\.9; Some GPU has 8\.6\. Leave the opt"):
            chosen(made, kv_cache_dtype=name)
    assert chosen(made) == choice_of("cuda", device="cuda")


def test_ranks_with_a_gpu_each_need_nccl(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(MissingPackage, match=r"2 ranks on GPUs .* need NCCL"):
        chosen(program(tmp_path), ranks=2)
    assert chosen(program(tmp_path), ranks=2, share_devices=True).name == "cuda"
    assert chosen(program(tmp_path)).name == "cuda"


def test_a_model_that_fits_two_gpus_is_served_by_two_ranks(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs = SimpleNamespace(decoder=program(tmp_path), config=SimpleNamespace(dtype="bfloat16"))
    source = open_checkpoint(local_source(tmp_path))
    needed = KIND.weight_bytes(programs.decoder, source, "bfloat16")
    monkeypatch.setattr(assembly, "free_bytes", lambda choice, options, share=None: needed * 2 // 3)
    with pytest.raises(NotEnoughMemory):
        assembly.measure_weights(chosen(programs.decoder), programs, source, BackendOptions(), None)
    of_two = chosen(programs.decoder, ranks=2)
    _, of_both = assembly.measure_weights(of_two, programs, source, BackendOptions(), None)
    assert needed <= of_both < 1.1 * needed, "norms twice"


@pytest.mark.parametrize("wants, words", [
    ({"device": "cpu", "kv_cache_dtype": "fp8_e4m3fn"}, "FP8 is for GPUs. Give `--kv-cache-dtype int8`, or none"),
    ({"kv_cache_dtype": "int8"}, "Supported: fp8_e4m3fn, fp8_e5m2. On a GPU the cache has"),
    ({"backend": "torch", "kv_cache_dtype": "fp8_e5m2"}, "torch backend's cache has .*: leave the option out"),
    ({"backend": "torch", "kv_cache_dtype": "int8"}, "torch backend's cache has .*: leave the option out"),
])  # fmt: skip
def test_a_cache_that_the_backend_lacks_is_refused_with_what_it_has(
    wants: dict[str, str], words: str, gpu: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=words):
        chosen(program(tmp_path), **wants)


def test_each_backend_takes_its_own_cache(gpu: SimpleNamespace, tmp_path: Path) -> None:
    assert chosen(program(tmp_path), device="cpu", kv_cache_dtype="int8") == choice_of("cpu")
    assert chosen(program(tmp_path), kv_cache_dtype="fp8_e5m2").name == "cuda"


def test_an_older_gpu_is_left_to_torch_with_the_reason(gpu: SimpleNamespace, tmp_path: Path) -> None:
    gpu.capability = (7, 5)
    found = chosen(program(tmp_path))
    assert (found.name, found.device) == ("torch", "cuda")
    assert found.reason == "it needs compute capability 8.0, this device has 7.5"
    with pytest.raises(Unsupported, match=r"this device has 7\.5"):
        chosen(program(tmp_path), backend="cuda")


def test_deterministic_is_a_promise_that_torch_cannot_give(gpu: SimpleNamespace, tmp_path: Path) -> None:
    made = program(tmp_path)
    assert chosen(made, deterministic=True).name == "cuda"
    assert chosen(made, deterministic=True, device="cpu").name == "cpu"
    with pytest.raises(ArgumentError, match=r"depend on how many rows a step has\. Leave the option out"):
        chosen(made, deterministic=True, backend="torch")
    assert chosen(made, ranks=2, deterministic=True).name == "cuda"
    odd = program(tmp_path, hidden_size=72, intermediate_size=136)
    with pytest.raises(ArgumentError, match="of whole 16 columns, not 72"):
        chosen(odd, deterministic=True)
    assert chosen(odd).name == "cuda"


# Choice of the attention


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "flashinfer_missing", lambda: "")


@pytest.mark.parametrize("name", ["", "triton", "paged", "flashdecoding", "flashdecoding-ipex"])
def test_without_being_asked_for_flashinfer_is_not_taken(name: str, installed: None, tmp_path: Path) -> None:
    assert prepare.attention_of(program(tmp_path, head_dim=64), name, "bfloat16") == ("triton", "")


def test_flashinfer_serves_what_it_can_and_what_it_cannot_is_said(installed: None, tmp_path: Path) -> None:
    made = program(tmp_path, head_dim=64)
    assert prepare.attention_of(made, "flashinfer", "bfloat16") == ("flashinfer", "")
    for how, words in (
        ({"dtype": "float32"}, "flashinfer has no float32 (give `--dtype bfloat16`)"),
        ({"dtype": "float16", "deterministic": True}, "`--deterministic` is given"),
    ):
        name, why = prepare.attention_of(made, "flashinfer", **how)
        assert name == "triton"
        assert words in why
    for attributes in ({"alibi": (0.5, 0.2)}, {"chunk": 4}, {"sinks": Weight((Part("sinks", 2),))}):
        name, why = prepare.attention_of(altered(made, **attributes), "flashinfer", "bfloat16")
        assert (name, why) == ("triton", "flashinfer is not used with ALiBi, sinks or chunks")
    name, why = prepare.attention_of(program(tmp_path), "flashinfer", "bfloat16")
    assert (name, why) == ("triton", "flashinfer has heads of 64, 128, 256, this model of 16")


@pytest.mark.skipif(HAS_FLASHINFER, reason="it is installed")
def test_where_flashinfer_is_missing_the_cure_is_named(tmp_path: Path) -> None:
    name, why = prepare.attention_of(program(tmp_path, head_dim=64), "flashinfer", "bfloat16")
    assert name == "triton"
    assert "`pip install flashinfer-python`" in why


@pytest.mark.parametrize("name, level, words", [
    ("paged", logging.INFO, "`attention` is paged: Triton's kernels are the nearest"),
    ("flashdecoding", logging.INFO, "`attention` is flashdecoding: Triton's kernels are the nearest"),
    ("flashinfer", logging.WARNING, "`attention` is flashinfer, but Triton's kernels attend: flashinfer has no"),
])  # fmt: skip
def test_what_became_of_a_name_is_logged(
    name: str, level: int, words: str, installed: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = program(tmp_path, head_dim=64)
    with caplog.at_level(logging.INFO):
        assert attention(made, BackendOptions(attention=name), "float32") == "triton"
    (record,) = caplog.records
    assert record.levelno == level
    assert words in record.getMessage()


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_other_backends_say_that_attention_is_their_own(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = program(tmp_path)
    source, folder = open_checkpoint(local_source(tmp_path)), str(kernel_folder())
    make(choice_of(name), made, source, attention="paged", cpu_threads=1, kernel_cache=folder).close()
    (record,) = caplog.records
    assert record.getMessage() == f"`attention` paged has no effect: the {name} backend has its own."


def test_nothing_is_logged_where_nothing_was_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert attention(program(tmp_path), BackendOptions(), "float32") == "triton"
        assert attention(program(tmp_path), BackendOptions(attention="triton"), "float32") == "triton"
    assert not caplog.records


# Findings of the doctor


def test_each_choice_is_told_with_its_rule(tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "flashinfer_version", lambda: "9.9")
    monkeypatch.setattr(explain, "flashinfer_missing", lambda: "")
    made = program(tmp_path, head_dim=64)
    source = open_checkpoint(local_source(tmp_path))

    def told(**how: Any) -> tuple[dict[str, str], str, str]:
        asked = KernelOptions(**{"dtype": "bfloat16"} | how)
        kernels = {kind: " / ".join(found) for kind, found in kernels_of(made, asked).items()}
        return rules_of(made, source, asked), kernels["Attention"], kernels["Linear"]

    rules, attention, linear = told()
    assert rules["attention"] == "triton; --attention flashinfer for runs of tokens"
    assert rules["KV cache"] == "bfloat16"
    assert "runs attend_tiles; heads of 64 with rope" in attention
    rules, attention, _ = told(attention="flashinfer", kv_cache_dtype="fp8_e5m2")
    assert rules["attention"] == "flashinfer 9.9; single tokens triton"
    assert rules["KV cache"] == "fp8_e5m2"
    assert "runs flashinfer's prefill" in attention
    rules, attention, linear = told(attention="flashinfer", deterministic=True)
    assert rules["attention"].startswith("triton, not flashinfer: ")
    assert rules["deterministic"].startswith("yes")
    assert (attention, linear) == ("attend_tiles, heads of 64 with rope", "few_rows at any number of rows")
    assert told(attention="paged")[0]["attention"].startswith("triton, the nearest to paged")
    assert told(dtype="float32")[2] == "cuBLAS"


def test_how_many_layers_have_scales_is_told(tmp_path: Path) -> None:
    made, file = program(tmp_path, num_hidden_layers=3), tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.1.self_attn.k_scale": torch.tensor(0.5)}, file)
    options = KernelOptions(dtype="bfloat16", kv_cache_dtype="fp8_e4m3fn")
    rules = rules_of(made, open_checkpoint(local_source(tmp_path)), options)
    assert rules["KV cache"] == "fp8_e4m3fn, scales of the checkpoint for 1 of 3 layers"


def test_an_fp8_cache_is_advised_where_the_checkpoint_has_scales_and_no_format_is_chosen(tmp_path: Path) -> None:
    made, file = program(tmp_path, num_hidden_layers=3), tmp_path / "model.safetensors"

    def told(kv_cache_dtype: str) -> str:
        options = KernelOptions(dtype="bfloat16", kv_cache_dtype=kv_cache_dtype)
        return rules_of(made, open_checkpoint(local_source(tmp_path)), options)["KV cache"]

    assert told("") == "bfloat16"
    tensors = load_file(file)
    for layer in (0, 2):
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor(0.5)
    save_file(tensors, file)
    assert told("").startswith("bfloat16; the checkpoint is calibrated for an FP8 cache, with scales for 2 of 3 layers")
    assert "--kv-cache-dtype fp8_e4m3fn" in told("")
    assert told("fp8_e5m2") == "fp8_e5m2"


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 129, 300, 1535, 1536, 9000])
@pytest.mark.parametrize(
    "outputs, columns, act",
    [(256, 512, ""), (8192, 4096, ""), (1024, 1024, "silu"), (96, 80, ""), (2048, 4096, "silu"), (64, 80, "silu")],
)
def test_what_is_told_of_products_is_what_they_do(
    rows: int, outputs: int, columns: int, act: str, copies: bool
) -> None:
    gated, scratch = bool(act), Scratch(64, torch.device("cpu"))
    scratch.tma = copies
    whole = outputs * (1 + gated)
    operands = Operands(torch.empty(1, columns), torch.empty(1, whole), None, act, torch.empty(1, outputs))
    product = Dense(torch.empty(whole, columns)).product(operands, scratch, False)
    told = product_of(outputs, columns, gated, KernelOptions(dtype="bfloat16", copies=copies))
    few = re.search(r"few_rows (above|up to (\d+)(?: and from (\d+))?)", told)
    if rows == 1:
        expected = "one_row" in told
    elif few is None or few[1] == "above":
        expected = few is not None
    else:
        expected = rows <= int(few[2]) or (few[3] is not None and rows >= int(few[3]))
    assert product.fits(rows) == expected
    assert ("cuBLAS" in told) == (few is None or few[1] != "above")
