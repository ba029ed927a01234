"""Memory that the CUDA backend counts before the cache gets the rest of a GPU."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
from support_cuda import DEVICE, ON_GPU, CudaDriver, torch, write_random

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.account import Account, graph_bytes, library_bytes
from tokenmill.errors import NotEnoughMemory


def held() -> dict[int, int]:
    """Return the bytes of every tensor's memory on the device, by address."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    there = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == DEVICE]
    return {storage.data_ptr(): storage.nbytes() for storage in there}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_what_is_counted_as_taken_is_what_is_held(family: str, tmp_path: Path) -> None:
    write_random(tmp_path, family, vocab_size=5000, max_position_embeddings=2048)
    before = held()
    driver = CudaDriver(tmp_path, limits=StepLimits(512, 24, 1024, 16), num_blocks=70)
    new = sum(size for address, size in held().items() if address not in before)
    account = driver._account
    cache = 71 * driver.block_bytes()  # 70 and the padding block
    counted = account.weights + account.step + account.sampler + cache
    assert abs(new - counted) < 0.01 * counted, (new, counted)
    assert driver.step_bytes() == account.step + account.sampler + account.to_come
    assert driver.claimed_bytes() == account.step + account.sampler
    assert min(account.weights, account.step, account.sampler, account.passing) > 0


def test_the_budget_is_told_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    gib = 1 << 30
    caplog.set_level(logging.INFO)
    account = Account(15 * gib, gib // 2, gib // 4, passing=gib // 8, graphs=gib // 4, libraries=gib // 2)
    assert account.to_come == 7 * gib // 8
    account.log(110 * gib, "902,144 tokens", gib // 2, 3 * gib // 2)
    assert "weights 15.0 GiB, step 0.5, sampler 0.2, graphs and libraries 0.5, KV cache 110.0 GiB" in caplog.text
    assert "(902,144 tokens), free 1.5, of which 0.4 are kept" in caplog.text


def test_graphs_and_libraries_are_counted_beforehand() -> None:
    assert graph_bytes(0, 300) == library_bytes(real=False) == 0
    assert 50 << 20 < graph_bytes(40, 300) < 1 << 30


def test_a_device_that_is_full_when_all_is_tried_is_told_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    write_random(tmp_path, "llama", num_hidden_layers=1)
    driver = CudaDriver(tmp_path, limits=StepLimits(16, 2, 64, 16), num_blocks=4)
    monkeypatch.setattr(driver, "_launch_all", full)
    with pytest.raises(NotEnoughMemory, match=r"no room for a step .* --cuda-memory-fraction"):
        driver.warm_up()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_what_is_kept_for_graphs_and_libraries_is_enough(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", dtype=torch.bfloat16, num_hidden_layers=8, vocab_size=32000)
    driver = CudaDriver(tmp_path, dtype="bfloat16", graphs=None, limits=StepLimits(2048, 256, 2048, 16))
    free = driver._device.free_bytes()
    driver.warm_up()
    while driver.idle_work():
        pass
    torch.cuda.empty_cache()
    assert free - driver._device.free_bytes() < driver._account.to_come
