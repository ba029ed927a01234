"""Kernels of layers with a state against the torch backend, on a GPU or under Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from support_cuda import ON_GPU, CudaDriver, cuda_job, torch
from support_models import Driver
from support_programs import VOCABULARY, Arrays
from support_states import Layers

from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.cuda import recurrence, states
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.backends.cuda.prepare import refusal
from tokenmill.program.value import Program

torch.set_num_threads(1)


class Drawn(CudaDriver):
    """The backend of a program without a checkpoint on disk."""

    def __init__(self, program: Program, source: Arrays, limits: StepLimits, **options: Any) -> None:
        CudaBackend.__init__(self, cuda_job(program, source, limits, cuda_graphs=(), **options))
        self.allocate(64)
        self.free = np.random.default_rng(3).permutation(64).tolist()
        self.known, self.tables = {}, {}


def both(kind: str, **sizes: Any) -> tuple[Drawn, Driver]:
    """Return a layer on both backends."""
    drawn = Layers(kind, **sizes)
    program, limits = drawn.program(), StepLimits(256, 4, 256, 16)
    assert refusal(program, "float32") == ""
    return Drawn(program, drawn.source(), limits), Driver(program, drawn.source(), limits=limits)


IDS = np.random.default_rng(7).integers(0, VOCABULARY, 200).tolist()
STEPS: list[list[tuple[int, list[int]]]] = [
    [(0, IDS[:18]), (1, IDS[40:42])],
    [(0, IDS[18:19]), (2, IDS[50:53]), (1, IDS[42:43])],
    [(1, IDS[44:49]), (2, IDS[54:56]), (0, IDS[20:21])],
    [(2, IDS[53:54]), (0, IDS[19:20]), (1, IDS[43:44])],
]
"""Runs that fill several chunks, runs shorter than a convolution and single tokens, mixed and alone."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a convolution": ("conv", {}),
    "a convolution of two taps without an activation": ("conv", {"taps": 2, "act": "", "bias": False}),
    "Mamba": ("space", {"heads": 12, "width": 1, "columns": 6, "each": True}),
    "Mamba 2": ("space", {"heads": 2, "groups": 2, "limits": (0.2, 0.9), "width": 20}),
    "Mamba 2 without biases": ("space", {"heads": 4, "bias": False}),
    "the delta rule": ("delta", {"heads": 2}),
    "the delta rule of wide heads": ("delta", {"heads": 2, "shared": 1, "columns": 20, "width": 40, "rate": 2.0}),
    "the delta rule with a decay for each column": ("delta", {"heads": 2, "each": True, "shared": 1}),
    "Griffin": ("lru", {"heads": 2, "columns": 10}),
}
SLOW = set(CASES) - {"a convolution", "Mamba 2", "the delta rule"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_runs_single_tokens_and_rewound_positions_equal_the_torch_backends(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ON_GPU:
        small = states.StateShapes(chunk=16, lru_chunk=16, channel_chunk=4, channels=8)
        monkeypatch.setattr(recurrence, "SHAPES_OF_FLOAT32", small)
    kind, sizes = CASES[name]
    found, expected = both(kind, **sizes)
    for ring in found._states._rings.values():
        ring.fill_(math.nan)  # A slot begins at zero, whatever is in it.
    for rows in STEPS:
        np.testing.assert_allclose(found.feed(rows), expected.feed(rows), atol=2e-4, rtol=1e-3)
    for backend in (found, expected):
        backend.known[1].pop()  # The last position is computed again with another token.
        backend.known[2].pop()
    again = [(1, [5]), (2, [6, 7, 8])]
    np.testing.assert_allclose(found.feed(again), expected.feed(again), atol=2e-4, rtol=1e-3)


def test_a_row_whose_state_is_lost_is_an_error() -> None:
    backend, _ = both("conv")
    backend._states.progress.after[1] = 3, 4
    one = [np.array([n], np.int32) for n in (1, 5, 1, 0)]
    with pytest.raises(RuntimeError, match="slot 1 has no state after 5 tokens"):
        backend.run(StepInputs(*one))


@pytest.mark.parametrize(
    ("kind", "sizes", "why"),
    [
        ("conv", {"taps": 17}, "no convolution over 17 tokens"),
        ("space", {"heads": 4, "width": 2, "each": True}, "heads of one column only"),
        ("space", {"columns": 257}, "no heads of 257 columns"),
        ("delta", {"width": 300}, "no heads of 300 columns"),
        ("lru", {"columns": 258}, "no heads of 258 columns"),
        ("conv", {"act": "softsign"}, "no kernel for the activation softsign"),
    ],
)
def test_layers_without_a_kernel_are_refused(kind: str, sizes: dict[str, Any], why: str) -> None:
    assert why in refusal(Layers(kind, **sizes).program(), "float32")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("space", {"heads": 2}),
        pytest.param("conv", {}, marks=pytest.mark.slow),
        pytest.param("space", {"heads": 16, "width": 1, "columns": 6, "each": True}, marks=pytest.mark.slow),
        pytest.param("delta", {"heads": 2, "width": 8}, marks=pytest.mark.slow),
    ],
)
def test_deterministic_sums_do_not_depend_on_how_a_prompt_is_divided(kind: str, sizes: dict[str, Any]) -> None:
    drawn = Layers(kind, **sizes)
    program, limits = drawn.program(), StepLimits(64, 4, 64, 16)
    whole, parts = (Drawn(program, drawn.source(), limits, deterministic=True) for _ in range(2))
    want = whole.feed([(0, IDS[:7]), (1, IDS[10:12])])
    parts.feed([(0, IDS[:3]), (1, IDS[10:11])])
    parts.feed([(0, IDS[3:4])])
    np.testing.assert_array_equal(parts.feed([(0, IDS[4:7]), (1, IDS[11:12])]), want)


def test_griffins_unit_is_refused_where_sums_must_not_depend_on_how_a_prompt_is_divided() -> None:
    assert "how a prompt is divided" in refusal(Layers("lru").program(), "float32", deterministic=True)


def test_the_bytes_of_states_are_counted_apart_from_those_of_a_step() -> None:
    backend, _ = both("conv")
    assert backend._account.states == 5 * 2 * 3 * 48 * 4  # slots and one for padding, ring, inputs, columns, bytes
    claimed = backend._account.step + backend._account.sampler
    assert backend.claimed_bytes() == claimed + backend._account.states
