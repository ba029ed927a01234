"""Attention by flashinfer instead of the CUDA backend's own: a substitute of the package, and the real one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support_cuda import DEVICE, ON_GPU, altered, program, torch

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda import flashinfer, prepare
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.flashinfer import FlashInfer
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.program import ops

HAS_FLASHINFER = ON_GPU and find_spec("flashinfer") is not None
FAKE, REAL = "a package that does as flashinfer", "flashinfer"


class Wrapper:
    """Substitute for flashinfer's wrapper, with its arguments: pages by number, runs at the end of their contexts."""

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
    """Return flashinfer itself if the parameter says so."""
    if request.param == REAL:
        yield pytest.importorskip("flashinfer")
        return
    monkeypatch.setattr(Wrapper, "made", [], raising=False)
    yield SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper)


def attended(memory: Memory, slots: CudaSlots, op: ops.Attention, rows: list[tuple[int, int, int]], scales: Any) -> Any:
    """Return attention of each token of the rows (slot, start, count), in float64 and token by token."""
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
] if ON_GPU else [(14, 2, 64, 0, 0.0, ""), (8, 1, 32, 33, 20.0, ""), (4, 2, 32, 0, 0.0, "float8_e4m3fn")])  # fmt: skip
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
    memory = Memory(made, limits, dtype, device, getattr(torch, cache) if cache else None, windows=False)
    memory.allocate(num_blocks)
    slots, rng = CudaSlots(limits, device), np.random.default_rng(4)
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
    memory = Memory(made, StepLimits(64, 4, 256, 16), torch.float32, Device("cpu"), windows=False)
    slots = CudaSlots(memory.limits, memory.device)
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
    flash = FlashInfer(package, memory, CudaSlots(memory.limits, memory.device))
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
    memory = Memory(made, StepLimits(64, 4, 256, 16), torch.float32, Device("cpu"), windows=False)
    slots = CudaSlots(memory.limits, memory.device)
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
    memory, seen = Memory(made, StepLimits(64, 4, 256, 16), torch.float32, Device("cpu"), windows=False), []
    slots = CudaSlots(memory.limits, memory.device)
    assert flashinfer.load(memory, slots, report=seen.append) is not None
    assert [(p.phase, p.done, p.total) for p in seen] == [("compile", 1, 2), ("compile", 2, 2)]
