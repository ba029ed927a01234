"""Weights on their way from the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support_cuda import DEVICE, torch
from support_programs import Arrays

from tokenmill.backends.accounts import dense_bytes
from tokenmill.backends.cuda import pack as cuda_pack
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.pack import pack, read_ahead
from tokenmill.backends.torch import pack as torch_pack
from tokenmill.layers.moe import Router
from tokenmill.layers.scope import Scope
from tokenmill.models.gpt_oss import bank_of
from tokenmill.parallel.group import Group
from tokenmill.program import ops
from tokenmill.program.ops import Part, Weight
from tokenmill.program.shard import shard
from tokenmill.program.value import Inputs, Value, record
from tokenmill.quant.base import reader_of
from tokenmill.weights.checkpoint import map_file


@pytest.mark.parametrize("first, last", [(0, 3), (1, 2), (700, 5000), (4999, 5000)])
def test_what_is_read_ahead_is_what_the_rows_lie_in(first: int, last: int, tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 24 + 5000 * 16).astype(np.uint8)
    content.tofile(tmp_path / "file")
    stored = map_file(tmp_path / "file")[24:].reshape(5000, 16)
    rows = stored.view(np.uint16)[first:last]
    asked = read_ahead(rows)
    assert asked == (24 + 16 * first, 24 + 16 * last)
    assert rows.tobytes() == content[slice(*asked)].tobytes()


def test_rows_in_memory_need_no_reading(tmp_path: Path) -> None:
    assert read_ahead(np.zeros((3, 4), np.float32)) is None
    assert read_ahead(torch.zeros(3, 4).numpy()) is None
    np.zeros(99, np.uint8).tofile(tmp_path / "file")
    assert read_ahead(map_file(tmp_path / "file")[50:50]) is None


def test_experts_are_one_tensor_and_interleaved_columns_are_transposed_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_pack, "_CHUNK", 640)  # bytes: five of the 24 columns
    width, inner, count = 24, 16, 3
    draw = np.random.default_rng(0)
    shapes = {"gate_up_proj": (count, width, 2 * inner), "down_proj": (count, inner, width)}
    shapes |= {"gate_up_proj_bias": (count, 2 * inner), "down_proj_bias": (count, width)}
    shapes |= {"t": (8, width), "r": (count, width)}
    drawn = {name: draw.normal(size=size) for name, size in shapes.items()}
    arrays = Arrays({name if len(name) == 1 else f"e.{name}": numbers for name, numbers in drawn.items()})
    bank = bank_of(Scope("e"), count, width, inner)

    def model(inputs: Inputs) -> Value:
        table = Weight((Part("t", 8),), width)
        x = inputs.ids.record(ops.Embed, width, ids=inputs.ids, table=table)
        ids, factors = Router(Scope(""), width, count, 2, weight="r")(x)
        return x.record(ops.Experts, x=x, ids=ids, factors=factors, act="silu", **bank._asdict())

    program = record(model)
    for size, rank in ((1, 0), (2, 1)):
        given = shard(program, size), arrays, reader_of(arrays), Group(rank, size), torch.float32  # type: ignore[arg-type]
        weights, plain = pack(*given, Device(DEVICE)), torch_pack.pack(*given, torch.device(DEVICE))  # type: ignore[arg-type]
        (op,) = (op for op in given[0].ops if isinstance(op, ops.Experts))
        for ws in op.weights().values():
            stack = weights.stacks[ws[0]]
            assert stack.is_contiguous()
            assert all(torch.equal(stack[i], plain[w]) for i, w in enumerate(ws))
        assert weights.nbytes == dense_bytes(given[0], arrays, "float32")  # type: ignore[arg-type]
