"""Options of the CUDA backend, from what a user says to what is chosen; flashinfer in place of its own attention."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support_cpu import kernel_folder
from support_cuda import DEVICE, ON_GPU, altered, torch, write_random
from triton.runtime.errors import OutOfResources

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda import detect, explain, flashinfer, prepare
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.explain import How, kernels_of, product_of, rules_of
from tokenmill.backends.cuda.flashinfer import FlashInfer
from tokenmill.backends.cuda.launch import Site
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.products import Product, Scratch
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.errors import ArgumentError, Unsupported
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.program import ops
from tokenmill.program.value import Program
from tokenmill.runtime import choice
from tokenmill.runtime.choice import Choice, Computing, choose
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source

HAS_FLASHINFER = ON_GPU and find_spec("flashinfer") is not None
FAKE, REAL = "a package that does as flashinfer", "flashinfer"


def program(folder: Path, family: str = "llama", **changes: Any) -> Program:
    write_random(folder, family, **{"num_hidden_layers": 2} | changes)
    return program_of(open_checkpoint(local_source(folder)).config)


# What is chosen


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with a GPU as `detect` would find it; what it finds can be changed."""
    found = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(detect, "missing", lambda: "")
    monkeypatch.setattr(detect, "device_name", lambda: "Some GPU")
    monkeypatch.setattr(detect, "capability", lambda: found.capability)
    return found


def chosen(made: Program, ranks: int = 1, **wants: Any) -> Choice:
    return choose(made, Computing(**wants), 16, ranks)


def test_an_fp8_cache_is_a_gpus_from_compute_capability_8_9_on(gpu: SimpleNamespace, tmp_path: Path) -> None:
    made = program(tmp_path)
    for name in prepare.KV_DTYPES:
        gpu.capability = (8, 9)
        assert chosen(made, kv_cache_dtype=name) == Choice("cuda", device="cuda")
        gpu.capability = (8, 6)
        with pytest.raises(Unsupported, match=r"FP8 needs compute capability 8\.9; Some GPU has 8\.6\. Leave the opt"):
            chosen(made, kv_cache_dtype=name)
    assert chosen(made) == Choice("cuda", device="cuda")


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
    assert chosen(program(tmp_path), device="cpu", kv_cache_dtype="int8") == Choice("cpu")
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
    with pytest.raises(ArgumentError, match=r"CUDA backend cannot: it does not share .* Leave the option out"):
        chosen(made, ranks=2, deterministic=True)
    odd = program(tmp_path, hidden_size=72, intermediate_size=136)
    with pytest.raises(ArgumentError, match="of whole 16 columns, not 72"):
        chosen(odd, deterministic=True)
    assert chosen(odd).name == "cuda"


# Whose kernels attend


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
        assert choice._attention(made, Computing(attention=name), "float32") == "triton"
    (record,) = caplog.records
    assert record.levelno == level
    assert words in record.getMessage()


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_other_backends_say_that_attention_is_their_own(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = program(tmp_path)
    wants = Computing(attention="paged", cpu_threads=1, kernel_cache=str(kernel_folder()))
    source, limits = open_checkpoint(local_source(tmp_path)), StepLimits(64, 4, 64, 16)
    choice.make_backend(Choice(name), made, source, limits, wants, Group(), lambda progress: None).close()
    (record,) = caplog.records
    assert record.getMessage() == f"`attention` paged has no effect: the {name} backend has its own."


def test_nothing_is_logged_where_nothing_was_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choice._attention(program(tmp_path), Computing(), "float32") == "triton"
        assert choice._attention(program(tmp_path), Computing(attention="triton"), "float32") == "triton"
    assert not caplog.records


# What the doctor tells


def test_each_choice_is_told_with_its_rule(tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "flashinfer_told", lambda: "9.9")
    monkeypatch.setattr(explain, "flashinfer_missing", lambda: "")
    made = program(tmp_path, head_dim=64)
    source = open_checkpoint(local_source(tmp_path))

    def told(**how: Any) -> tuple[dict[str, str], str, str]:
        asked = How(**{"dtype": "bfloat16"} | how)
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
    rules = rules_of(made, open_checkpoint(local_source(tmp_path)), How(dtype="bfloat16", kv_cache_dtype="fp8_e4m3fn"))
    assert rules["KV cache"] == "fp8_e4m3fn, scales of the checkpoint for 1 of 3 layers"


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
    product = Product(
        torch.empty(1, columns), torch.empty(outputs * (1 + gated), columns), None, torch.empty(1, outputs), act,
        scratch,
    )  # fmt: skip
    told = product_of(outputs, columns, gated, How(dtype="bfloat16", copies=copies))
    few = re.search(r"few_rows (above|up to (\d+)(?: and from (\d+))?)", told)
    if rows == 1:
        expected = "one_row" in told
    elif few is None or few[1] == "above":
        expected = few is not None
    else:
        expected = rows <= int(few[2]) or (few[3] is not None and rows >= int(few[3]))
    assert product.fits(rows) == expected
    assert ("cuBLAS" in told) == (few is None or few[1] != "above")


# flashinfer


class Wrapper:
    """Attends as flashinfer's wrapper does, from the same arguments: pages by number, runs at the end of theirs."""

    made: list[Wrapper]

    def __init__(self, workspace: Any, kv_layout: str, *, backend: str) -> None:
        assert (kv_layout, backend) == ("NHD", "fa2")
        self.made.append(self)
        self.plans = 0

    def plan(self, qo_indptr: Any, paged_kv_indptr: Any, paged_kv_indices: Any, paged_kv_last_page_len: Any,
             num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *, causal: bool, sm_scale: float,
             window_left: int, logits_soft_cap: float, q_data_type: Any, kv_data_type: Any) -> None:  # fmt: skip
        assert causal
        for array in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert array.dtype == torch.int32
        assert len(paged_kv_indices) == paged_kv_indptr[-1]
        self.kept = {k: v for k, v in locals().items() if k != "self"}
        self.plans += 1

    def run(self, q: Any, paged_kv_cache: tuple[Any, Any], *, out: Any, enable_pdl: bool, k_scale: float | None,
            v_scale: float | None) -> None:  # fmt: skip
        p = SimpleNamespace(**self.kept)
        assert q.shape == out.shape == (p.qo_indptr[-1], p.num_qo_heads, p.head_dim_qk)
        assert q.dtype == p.q_data_type
        group = p.num_qo_heads // p.num_kv_heads
        for i in range(len(p.qo_indptr) - 1):
            pages = p.paged_kv_indices[p.paged_kv_indptr[i] : p.paged_kv_indptr[i + 1]].long()
            length = (len(pages) - 1) * p.page_size + int(p.paged_kv_last_page_len[i])
            k, v = (
                (part[pages].float().reshape(-1, p.num_kv_heads, p.head_dim_qk)[:length] * (scale or 1.0))
                .repeat_interleave(group, 1).transpose(0, 1)
                for part, scale in zip(paged_kv_cache, (k_scale, v_scale), strict=True)
            )  # fmt: skip
            of = slice(int(p.qo_indptr[i]), int(p.qo_indptr[i + 1]))
            at = torch.arange(length - (of.stop - of.start), length)[:, None] - torch.arange(length)
            hidden = (at < 0) | ((at > p.window_left) if p.window_left >= 0 else (at < 0))
            scores = q[of].float().transpose(0, 1) @ k.transpose(1, 2) * p.sm_scale
            if p.logits_soft_cap:
                scores = p.logits_soft_cap * torch.tanh(scores / p.logits_soft_cap)
            out[of] = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1).to(out.dtype)


@pytest.fixture
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """flashinfer itself where the parameter says so."""
    if request.param == REAL:
        yield pytest.importorskip("flashinfer")
        return
    monkeypatch.setattr(Wrapper, "made", [], raising=False)
    yield SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper)


def attended(memory: Memory, slots: CudaSlots, op: ops.Attention, rows: list[tuple[int, int, int]], scales: Any) -> Any:
    """What attention is of each token of the rows (slot, start, count), in float64 and token by token."""
    heads, shared = op.q.width // op.head_dim, op.q.width // op.k.width
    keys, values = (part.double().cpu().view(-1, heads // shared, op.head_dim) for part in memory.cache(op.layer))
    queries = memory.queries.view(-1)[: memory.rows["tokens"] * op.q.width].view(-1, heads, op.head_dim).double().cpu()
    size, tables, made = memory.limits.block_size, slots.tables.cpu(), []
    for slot, start, count in rows:
        for position in range(start, start + count):
            first = max(0, position + 1 - op.window) if op.window else 0
            seen = torch.arange(first, position + 1)
            places = tables[slot, seen // size].long() * size + seen % size
            k, v = (x[places].repeat_interleave(shared, 1) * s for x, s in zip((keys, values), scales, strict=True))
            scores = torch.einsum("hd,thd->ht", queries[len(made)], k) * op.scale
            scores = op.softcap * torch.tanh(scores / op.softcap) if op.softcap else scores
            made.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v))
    return torch.stack(made)


ON_BOTH = [FAKE] if not ON_GPU else [pytest.param(REAL, marks=pytest.mark.skipif(not HAS_FLASHINFER, reason="none"))]


@pytest.mark.parametrize("package", ON_BOTH, indirect=True)
@pytest.mark.parametrize("heads, kv_heads, head_dim, window, softcap, cache", [
    (4, 4, 64, 0, 0.0, ""), (14, 2, 64, 0, 0.0, ""), (8, 2, 128, 0, 0.0, ""), (8, 1, 128, 33, 0.0, ""),
    (4, 2, 256, 0, 20.0, ""), (8, 2, 128, 0, 0.0, "float8_e4m3fn"),
])  # fmt: skip
def test_runs_are_attended_to_over_scattered_pages_behind_their_prefix(
    heads: int, kv_heads: int, head_dim: int, window: int, softcap: float, cache: str, package: Any, tmp_path: Path
) -> None:
    made = program(
        tmp_path, "qwen3", head_dim=head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=1, max_position_embeddings=1024,
    )  # fmt: skip
    made = altered(prepare.fused(made), window=window, softcap=softcap)
    device, limits, num_blocks = Device(DEVICE), StepLimits(512, 8, 1024, 16), 200
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    memory = Memory(made, limits, dtype, device, getattr(torch, cache) if cache else None)
    memory.allocate(num_blocks)
    slots, rng = CudaSlots(limits, 128, device), np.random.default_rng(4)
    for slot in range(8):
        slots.set_blocks(slot, rng.permutation(num_blocks)[:64].astype(np.int32))
    (op,) = (op for op in made.ops if isinstance(op, ops.Attention))
    draw, scales = torch.Generator(DEVICE).manual_seed(1), (0.5, 2.0) if cache else (1.0, 1.0)
    for tensor in (memory.queries, *memory.cache(op.layer)):
        tensor.copy_(torch.randn(tensor.shape, generator=draw, device=DEVICE))
    flash = FlashInfer(package, memory, slots, {op.layer: scales} if cache else None)
    assert list(flash.compile()) == [1]
    launch, out = flash.lower(op), memory.value(op.out).view(-1, heads, head_dim)
    for rows in (
        [(0, 0, 40)], [(3, 5, 2), (1, 0, 16)], [(2, 700, 1), (5, 300, 33), (7, 15, 1), (6, 31, 65), (4, 12, 1)],
        [(0, 999, 1), (1, 500, 1), (2, 480, 300)],
    ):  # fmt: skip
        out.fill_(float("nan"))
        flash.plan(*np.array(rows, np.int32).T)
        launch()
        runs = [i for i, row in enumerate(rows) if row[2] > 1]
        ends = np.cumsum([row[2] for row in rows])
        first, last = int(ends[runs[0]]) - rows[runs[0]][2], int(ends[runs[-1]])
        expected = attended(memory, slots, op, rows, scales)[first:last]
        rough = 2e-2 if ON_GPU else 1e-5
        np.testing.assert_allclose(out[first:last].double().cpu(), expected, rtol=rough, atol=rough)
        assert out[:first].isnan().all()
        assert out[last : int(ends[-1]) + 9].isnan().all()


@pytest.mark.parametrize("package", [FAKE], indirect=True)
def test_layers_of_a_kind_share_a_plan_and_kinds_have_their_own(package: Any, tmp_path: Path) -> None:
    made = prepare.fused(program(tmp_path, "qwen2_window", num_hidden_layers=3))
    memory = Memory(made, StepLimits(64, 4, 256, 16), torch.float32, Device("cpu"))
    slots = CudaSlots(memory.limits, 128, memory.device)
    flash = FlashInfer(package, memory, slots)
    assert flash.num_kinds == len(Wrapper.made) == 2
    flash.plan(*np.array([(0, 0, 5), (1, 20, 1)], np.int32).T)
    flash.plan(*np.array([(0, 5, 9), (1, 21, 1)], np.int32).T)
    assert [wrapper.plans for wrapper in Wrapper.made] == [2, 2]
    assert sorted(wrapper.kept["window_left"] for wrapper in Wrapper.made) == [-1, 7]


@pytest.mark.parametrize("package", [FAKE], indirect=True)
def test_a_plan_waits_for_what_the_one_before_sent_even_if_that_failed(
    package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Watched(Device):
        def mark(self) -> Any:
            number = sum(word.startswith("mark") for word in seen)
            seen.append(f"mark {number}")
            return SimpleNamespace(wait=lambda: seen.append(f"wait {number}"))

    def plan(self: Wrapper, *words: Any, **named: Any) -> None:
        seen.append("plan")
        if seen.count("plan") == 2:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(Wrapper, "plan", plan)
    memory = Memory(prepare.fused(program(tmp_path)), StepLimits(64, 4, 256, 16), torch.float32, Watched("cpu"))
    flash = FlashInfer(package, memory, CudaSlots(memory.limits, 128, memory.device))
    rows = np.array([(0, 0, 5)], np.int32).T
    flash.plan(*rows)
    with pytest.raises(torch.OutOfMemoryError):
        flash.plan(*rows)
    flash.plan(*rows)
    assert seen == ["mark 0", "wait 0", "plan", "mark 1", "wait 1", "plan", "mark 2", "wait 2", "plan", "mark 3"]


def test_a_package_that_fails_leaves_attention_to_triton_and_names_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Wrapper, "made", [], raising=False)

    class Broken(Wrapper):
        def plan(self, *words: Any, **named: Any) -> None:
            raise RuntimeError("Ninja build failed. Ninja output:\nnvcc: not found\n" * 50)

    made = prepare.fused(program(tmp_path))
    memory = Memory(made, StepLimits(64, 4, 256, 16), torch.float32, Device("cpu"))
    slots = CudaSlots(memory.limits, 128, memory.device)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Broken))
    assert flashinfer.load(memory, slots) is None
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # not installed
    assert flashinfer.load(memory, slots) is None
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    for record, words in zip(warnings, ("RuntimeError: Ninja build failed.", "ModuleNotFoundError"), strict=True):
        assert words in record.getMessage()
        assert "`nvcc` and `ninja`" in record.getMessage()
        assert len(record.getMessage()) < 400


def test_loading_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Wrapper, "made", [], raising=False)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper))
    made = prepare.fused(program(tmp_path, "qwen2_window", num_hidden_layers=3))
    memory, seen = Memory(made, StepLimits(64, 4, 256, 16), torch.float32, Device("cpu")), []
    slots = CudaSlots(memory.limits, 128, memory.device)
    assert flashinfer.load(memory, slots, report=seen.append) is not None
    assert [(p.phase, p.done, p.total) for p in seen] == [("compile", 1, 2), ("compile", 2, 2)]


# launches


def test_a_kernel_that_needs_more_shared_memory_than_there_is_keeps_fewer_rounds_in_flight() -> None:
    launched: list[tuple[Any, ...]] = []

    class Kernel:
        """Fits with two."""

        needs = 2

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, STAGES: int, num_warps: int) -> object:
                if self.needs < STAGES:
                    raise OutOfResources(STAGES << 15, self.needs << 15, "shared memory")
                launched.append((*grid, *arguments, STAGES, num_warps))
                return object()

            return launch

    Site(Kernel())((3,), "x", STAGES=4, num_warps=8)
    assert launched == [(3, "x", 2, 8)]
    Kernel.needs = 0
    with pytest.raises(OutOfResources):
        Site(Kernel())((3,), "x", STAGES=4, num_warps=8)
