"""Variants of attention and of row operations on the CUDA backend, each against torch: see `test_cuda.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support_cuda import CudaDriver, cuda_job, torch
from support_models import Driver
from support_programs import HEAD, HEADS, INNER, KV_HEADS, VOCABULARY, WIDTH, Arrays, Draw

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.backends.cuda.shapes import DecodeShape, LatentShape
from tokenmill.backends.cuda.sizes import expansions_of
from tokenmill.program import ops, special
from tokenmill.program.rope import RopeTable
from tokenmill.program.value import Program, Value

torch.set_num_threads(1)


STEPS = [[(0, 5), (1, 2)], [(1, 1), (0, 1)]]
"""Rows of steps: slot and number of tokens."""


class Drawn(CudaDriver):
    """The backend of a program without a checkpoint on disk."""

    def __init__(self, program: Program, source: Arrays, limits: StepLimits, **options: Any) -> None:
        CudaBackend.__init__(self, cuda_job(program, source, limits, cuda_graphs=(), **options))
        self._lowering._attention._tile_sums.zero_()
        self.allocate(64)
        self.free = np.random.default_rng(3).permutation(64).tolist()
        self.known, self.tables = {}, {}


def assert_equals_torch(
    draw: Draw,
    steps: list[list[tuple[int, int]]] = STEPS,
    off: float = 2e-4,
    limits: StepLimits = StepLimits(256, 4, 256, 16),  # noqa: B008  a constant
    **options: Any,
) -> Drawn:
    """Assert that the logits of every step are those of torch, and return the backend."""
    program, rng = draw.program(), np.random.default_rng(5)
    backend = Drawn(program, draw.source(), limits, **options)
    expected = Driver(program, draw.source(), limits=limits)  # type: ignore[arg-type]
    for step in steps:
        rows = [(slot, rng.integers(0, VOCABULARY, count).tolist()) for slot, count in step]
        np.testing.assert_allclose(backend.feed(rows), expected.feed(rows), rtol=1e-3, atol=off)
    return backend


def split_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split short contexts, too: long ones take the interpreter minutes."""
    monkeypatch.setattr("tokenmill.backends.cuda.attention.LEAST_KEYS", 32)
    monkeypatch.setattr("tokenmill.backends.cuda.shapes.LEAST_KEYS", 32)
    monkeypatch.setattr("tokenmill.backends.cuda.latent.LEAST_KEYS", 32)
    for name in ("_SHAPES", "_SHAPES_OF_CODES"):
        monkeypatch.setattr(f"tokenmill.backends.cuda.shapes.{name}", (DecodeShape(16, 4, 16, 1, 4),) * 5)
    monkeypatch.setattr("tokenmill.backends.cuda.latent.latent_shape", lambda *_: LatentShape(16, 16, 4, 16, 1, 4))


class OneLayer(Draw):
    """A program of one layer whose attention and activation are those of a test."""

    def _model(self, inputs: Any) -> Value:
        x = inputs.ids.record(ops.Embed, WIDTH, ids=inputs.ids, table=self.weight(VOCABULARY, WIDTH))
        y = x + self.attend(x)
        y = self.act(y.record(ops.Norm, x=y, weight=None, eps=1e-5, center=True))
        return self.linear(y.record(ops.TakeRows, rows="samples", x=y), VOCABULARY)[0]

    def attend(self, x: Value) -> Value:
        raise NotImplementedError

    def act(self, x: Value) -> Value:
        return x


class Rows(OneLayer):
    """Norms of heads of every kind, rotations that attention does not include, and the activations of one model."""

    def __init__(self, rotary_dim: int, interleaved: bool, each: bool, act: str) -> None:
        super().__init__(1)
        self.table = RopeTable.of(rotary_dim, 1e4, 256, None, interleaved=interleaved)
        self.each, self.activation = each, act

    def attend(self, x: Value) -> Value:
        q, k, v = self.linear(x, HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD)
        q, k = (y.record(ops.Rope, x=y, rope=self.table, head_dim=HEAD) for y in (q, k))
        q, k = self.norm(q, HEAD, center=True, bias=True, each=self.each), self.norm(k, HEAD, plain=True, center=True)
        q = q.record(special.ScaleByPosition, x=q, beta=0.4, length=3, offset=1)
        return q.record(ops.Attention, HEADS * HEAD, q=q, k=k, v=v, layer=0, head_dim=HEAD, scale=0.3)

    def act(self, x: Value) -> Value:
        gate, up = self.linear(x, INNER, INNER)
        y = up.record(special.XIelu, x=up, alpha_p=self.weight(1), alpha_n=self.weight(1))
        y = gate.record(ops.GatedAct, gate=gate, up=y, act=self.activation)
        return y.record(ops.Act, x=y, act=self.activation)


@pytest.mark.parametrize(
    "rotary_dim, interleaved, each, act",
    [
        (8, True, True, "linear"), pytest.param(16, False, False, "quick_gelu", marks=pytest.mark.slow),
        pytest.param(8, False, False, "sigmoid", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_operations_on_rows_and_heads(rotary_dim: int, interleaved: bool, each: bool, act: str) -> None:
    assert_equals_torch(Rows(rotary_dim, interleaved, each, act))


class Biased(OneLayer):
    """Attention whose softmax has sinks, ALiBi or both. A negative window: within chunks of that size."""

    def __init__(self, sinks: bool, alibi: bool, window: int = 0, softcap: float = 0.0) -> None:
        super().__init__(2)
        self.sinks, self.alibi, self.window, self.softcap = sinks, alibi, window, softcap

    def attend(self, x: Value) -> Value:
        q, k, v = self.linear(x, HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD)
        return q.record(
            ops.Attention, HEADS * HEAD, q=q, k=k, v=v, layer=0, head_dim=HEAD, scale=0.3, window=max(self.window, 0),
            chunk=max(-self.window, 0), softcap=self.softcap, sinks=self.weight(HEADS) if self.sinks else None,
            alibi=(0.5, 0.03, 1.0, 0.2) if self.alibi else (),
        )  # fmt: skip


LONG = [[(0, 66)], [(0, 1)], [(0, 2), (1, 1)]]


@pytest.mark.parametrize("sinks, alibi, window, softcap, deterministic", [
    (True, True, 0, 0.0, False), pytest.param(True, False, 40, 2.0, False, marks=pytest.mark.slow),
    pytest.param(True, True, 20, 0.0, True, marks=pytest.mark.slow),
    pytest.param(False, True, -24, 0.0, False, marks=pytest.mark.slow),
    pytest.param(True, False, -7, 0.0, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_sinks_alibi_windows_and_chunks_in_split_attention(
    sinks: bool, alibi: bool, window: int, softcap: float, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_early(monkeypatch)
    backend = assert_equals_torch(Biased(sinks, alibi, window, softcap), LONG, deterministic=deterministic)
    found = backend._lowering._attention
    assert found._tile_counts.sum() == found._counts.sum() == 0
    assert bool(found._tile_sums.any()) != deterministic, "some runs were split"


@pytest.mark.slow
def test_sinks_beside_a_cache_of_8_bit_floats() -> None:
    assert_equals_torch(Biased(True, True), off=0.1, kv_cache_dtype="fp8_e4m3fn")


class Latent(OneLayer):
    """Attention to compressed rows, with sizes of which most are no powers of two."""

    def __init__(self, heads: int = 3, rotated: bool = True, interleaved: bool = True) -> None:
        super().__init__(3)
        self.heads, self.rotated, self.interleaved = heads, rotated, interleaved

    def attend(self, x: Value) -> Value:
        turned, plain, values, rank = 6, 10, 12, 24
        (q,) = self.linear(x, self.heads * (plain + turned))
        latent, key = self.linear(x, rank, turned)
        y = q.record(
            ops.LatentAttention, self.heads * values, q=q, latent=latent, key=key, layer=0, value_dim=values,
            expand=self.weight(self.heads * (plain + values), rank), head_dim=plain + turned, scale=0.3,
            rope=RopeTable.of(turned, 100.0, 256, None) if self.rotated else None, interleaved=self.interleaved,
        )  # fmt: skip
        return self.linear(y, WIDTH)[0]


@pytest.mark.parametrize("heads, rotated, interleaved, deterministic", [
    (3, True, True, False), pytest.param(18, True, False, False, marks=pytest.mark.slow),
    pytest.param(4, False, True, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_compressed_rows_are_attended_to_and_expanded(
    heads: int, rotated: bool, interleaved: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_early(monkeypatch)
    steps = LONG
    backend = assert_equals_torch(Latent(heads, rotated, interleaved), steps, deterministic=deterministic)
    found = backend._lowering._latent
    assert found._parts.any(), "some tokens were split"
    assert bool(found._tile_sums.any()) != deterministic, "some runs were split"
    assert backend.block_bytes() == 16 * (24 + 6) * 4


@pytest.mark.parametrize("rows_of_class", [pytest.param(1, marks=pytest.mark.slow)])
def test_splits_of_compressed_rows_are_listed(rows_of_class: int, monkeypatch: pytest.MonkeyPatch) -> None:
    split_early(monkeypatch)
    monkeypatch.setattr("tokenmill.backends.cuda.latent.CLASSES", (rows_of_class, 16, 1 << 30))
    assert_equals_torch(Latent(), [[(0, 40), (1, 7)], [(1, 1), (0, 1)], [(0, 1), (2, 5), (1, 1)]])


def test_few_expanded_rows_are_expanded_for_some_heads_and_runs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.backends.cuda.latent._EXPANDED", 1)
    monkeypatch.setattr("tokenmill.backends.cuda.latent._LEAST_HELD", 1)
    draw = Latent(heads=3)
    assert_equals_torch(draw, [[(0, 17), (1, 9)], [(1, 3), (2, 9), (0, 6)]], limits=StepLimits(64, 4, 32, 16))


@pytest.mark.slow
def test_compressed_rows_of_8_bit_floats() -> None:
    assert_equals_torch(Latent(), off=0.1, kv_cache_dtype="fp8_e4m3fn")


def test_runs_are_divided_among_expansions() -> None:
    firsts, starts, counts = np.array([0, 5, 12]), np.array([10, 0, 3], np.int32), np.array([5, 7, 2], np.int32)
    made = expansions_of(firsts, starts, counts, np.array([4, 2, 9], np.int32), 4, 20)
    assert made.rows.tolist() == [[4, 15, 0], [2, 7, 0], [9, 5, 7]]
    tiles = [[0, 10, 4, 4, 0], [4, 14, 1, 4, 0], [5, 0, 4, 2, 0], [9, 4, 3, 2, 0], [12, 3, 2, 9, 7]]
    assert made.tiles.tolist() == tiles
    assert [e[2:] for e in made.sent(torch.tensor(0), torch.tensor(0))] == [(0, 1, 0, 2, 15, 15), (1, 2, 2, 3, 12, 7)]


class Streams(OneLayer):
    """Operations on streams beside each other, and on numbers that torch scales, bounds and thresholds."""

    def attend(self, x: Value) -> Value:
        x = x.record(special.Clip, x=x, limit=0.7)
        y = x.record(special.WithMagnitude, x=self.linear(x, WIDTH)[0], like=x, least=0.01)
        streams = x.record(special.Beside, 2 * WIDTH, x=x, y=y)
        (mix,), (correct,) = self.linear(x, 4), self.linear(x, 2)
        streams = streams.record(special.MixStreams, x=streams, factors=mix)
        streams = streams.record(special.CorrectStreams, x=streams, y=y, factors=correct)
        streams = streams.record(special.AddToOthers, x=streams, y=x)
        x = x.record(special.Sparsify, x=streams.split(WIDTH, WIDTH)[1], deviations=0.3)
        ids = x.tape.new("tokens", 1, "ids")
        x.tape.ops.append(special.Within(out=ids, ids=self.ids, rows=9))
        x = x + ids.record(ops.Embed, WIDTH, ids=ids, table=self.weight(9, WIDTH))
        return x.record(special.ScaleByWeight, x=x, weight=self.weight(WIDTH))

    def _model(self, inputs: Any) -> Value:
        self.ids = inputs.ids
        return super()._model(inputs)


def test_operations_of_single_architectures_are_computed_by_torch() -> None:
    assert_equals_torch(Streams(4), STEPS[:2])
