"""Launches that bypass Triton's launcher give the same results."""

from __future__ import annotations

from typing import Any

import pytest
from support_cuda import ON_GPU, torch

from tokenmill.backends.cuda.kernels.rows import embed_rows, take_rows
from tokenmill.backends.cuda.launch import Site

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def test_a_place_launches_what_it_found_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    site, ways = Site(take_rows), 0
    x = torch.randn(64, 512, device="cuda")
    own = type(take_rows).run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal ways
        ways += 1
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(take_rows), "run", counted)
    for some in (True, False, True, True, False):
        for rows in (1, 17, 64):
            chosen = torch.randperm(64, device="cuda")[:rows].int()
            out = torch.full((64, 512), float("nan"), device="cuda")
            site((rows, 1), x, chosen, out, x.stride(0), WIDTH=512, BLOCK=1024, SOME=some, num_warps=4)
            expected = x[chosen.long()] if some else x[:rows]
            assert torch.equal(out[:rows], expected)
            assert out[rows:].isnan().all()
    assert ways == 2, "once for each set of constants"


def test_a_launch_is_captured_in_a_graph() -> None:
    site, table = Site(embed_rows), torch.randn(32, 128, device="cuda")
    pairs = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32, device="cuda")
    tokens = torch.tensor([[3, 9], [5, 7]], dtype=torch.int32, device="cuda")
    out = torch.zeros(2, 128, device="cuda")

    def run() -> None:
        constants = {"WIDTH": 128, "BLOCK": 128, "BY_POSITION": False, "BOUND": False}
        site((2,), pairs, tokens, table, out, 2, 1.0, 32, **constants, num_warps=4)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    tokens.fill_(4)
    graph.replay()
    assert torch.equal(out, table[[4, 4]])
