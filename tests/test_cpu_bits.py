"""Batch invariance: a row's logits are the same bits in any batch, for any chunks of its prompt and number of threads.

Models of two kinds of weights: blocks of 4 bits as in the embedded model, and bfloat16 with rounded activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support_cpu import CpuDriver
from support_models import make_checkpoint

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cpu.isa import available

SLOTS = 34
LIMITS = StepLimits(512, SLOTS, 256, 16)
PROMPT = 41


@pytest.fixture(scope="module", params=["embedded", "bfloat16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "embedded":
        return request.getfixturevalue("embedded_model")  # type: ignore[no-any-return]
    folder = tmp_path_factory.mktemp("bfloat16")
    make_checkpoint(folder, "qwen2", dtype=torch.bfloat16, vocab_size=40000, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def backend(model: Path) -> Iterator[CpuDriver]:
    made = CpuDriver.of(model, limits=LIMITS, num_blocks=SLOTS * 8)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def emptied(backend: CpuDriver) -> None:
    for slot in range(SLOTS):
        backend.forget(slot)


def prompt(i: int, length: int = PROMPT) -> list[int]:
    return np.random.default_rng(i).integers(100, 40000, length).tolist()


@pytest.fixture(scope="module")
def alone(backend: CpuDriver) -> NDArray[np.float32]:
    """Return the logits after prompts 0 … 4 and after one more decoded token, each computed by itself."""
    found = []
    for i in range(5):
        backend.forget(0)
        backend.feed([(0, prompt(i))])
        found.append(backend.feed([(0, [7 + i])])[0])
    return np.stack(found)


@pytest.mark.parametrize("rows", [2, 5, 16, 33])
def test_a_batch_changes_no_bit(backend: CpuDriver, alone: NDArray[np.float32], rows: int) -> None:
    order = np.random.default_rng(rows).permutation(rows).tolist()
    for i in order:
        backend.feed([(i, prompt(i))])
    got = backend.feed([(i, [7 + i]) for i in order])
    for place, i in enumerate(order):
        if i < 5:
            np.testing.assert_array_equal(got[place], alone[i])


def test_prompts_computed_together_change_no_bit(backend: CpuDriver, alone: NDArray[np.float32]) -> None:
    backend.feed([(i, prompt(i)) for i in range(10)])
    np.testing.assert_array_equal(backend.feed([(i, [7 + i]) for i in range(10)])[:5], alone)


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 40])
def test_chunks_change_no_bit(backend: CpuDriver, alone: NDArray[np.float32], chunk: int) -> None:
    ids = prompt(2)
    for start in range(0, PROMPT, chunk):
        backend.feed([(0, ids[start : start + chunk])])
    np.testing.assert_array_equal(backend.feed([(0, [9])])[0], alone[2])


def test_a_prompt_instead_of_a_decode_changes_no_bit(backend: CpuDriver, alone: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(backend.feed([(0, [*prompt(3), 10])])[0], alone[3])


def test_a_prompt_beside_a_decode_changes_no_bit(backend: CpuDriver, alone: NDArray[np.float32]) -> None:
    backend.feed([(1, prompt(1))])
    got = backend.feed([(0, prompt(8)[:20]), (1, [8]), (2, prompt(6)), (3, prompt(9)[:5])])
    np.testing.assert_array_equal(got[1], alone[1])


def test_a_cached_prefix_changes_no_bit(backend: CpuDriver, alone: NDArray[np.float32]) -> None:
    backend.feed([(0, [*prompt(4)[:32], 5, 6, 7])])
    backend.forget(0, keep=32)
    backend.feed([(0, prompt(4)[32:])])
    np.testing.assert_array_equal(backend.feed([(0, [11])])[0], alone[4])


def test_a_preemption_changes_no_bit(backend: CpuDriver, alone: NDArray[np.float32]) -> None:
    backend.feed([(0, prompt(0)), (1, prompt(5))])
    backend.feed([(0, [7]), (1, [3])])
    backend.forget(0)
    backend.feed([(1, [4])])
    np.testing.assert_array_equal(backend.feed([(1, [2]), (0, [*prompt(0), 7])])[1], alone[0])


@pytest.mark.parametrize("threads", [1, 3])
def test_another_number_of_threads_changes_no_bit(model: Path, alone: NDArray[np.float32], threads: int) -> None:
    other = CpuDriver.of(model, limits=LIMITS, num_blocks=64, cpu_threads=threads)
    other.feed([(i, prompt(i)) for i in range(5)])
    np.testing.assert_array_equal(other.feed([(i, [7 + i]) for i in range(5)]), alone)
    other.close()


def test_another_instruction_set_changes_nothing_but_the_last_bits_of_logits(
    model: Path, backend: CpuDriver, alone: NDArray[np.float32]
) -> None:
    if "avx2" not in [isa.name for isa in available()]:
        pytest.skip("this machine has no AVX2")
    other = CpuDriver.of(model, limits=LIMITS, num_blocks=64, cpu_isa="avx2")
    other.feed([(0, prompt(0))])
    got = other.feed([(0, [7])])[0]
    rounded = backend.isa.pairs and any(line.kernel == "narrow" for line in backend._lines)
    assert np.abs(got - alone[0]).max() < (2e-2 if rounded else 1e-4) * np.abs(alone[0]).max()
    other.close()
