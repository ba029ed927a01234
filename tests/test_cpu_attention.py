"""Attention, the paged cache and rotations of the CPU backend, against numpy; results are batch-invariant."""

import numpy as np
import pytest
from support_kernels import ISAS, address, load, matrix, quantized, walk

from tokenmill.backends.cpu import layout as t
from tokenmill.backends.cpu.attention_tiles import PAIR_BYTES, Heads
from tokenmill.backends.cpu.rope import cos_sin_stride, frequencies
from tokenmill.program.rope import RopeTable

KV_HEADS, BLOCKS, CONTEXT = 2, 40, 160
SHAPES = [Heads("f16", 64, 3), Heads("int8", 64, 3), Heads("f16", 80, 7, True), Heads("int8", 16, 1, sinks=True)]
CASES = [(name, heads) for name in ISAS for heads in SHAPES if heads is SHAPES[0] or name in (ISAS[0], "avx2", "neon")]
CAP, EPS = 5.0, 1e-5


def rope_of(dim):
    """Return a rotation of most columns of a head."""
    return RopeTable.of(dim * 3 // 4 // 2 * 2, 1e4, 4096, None)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1].name}")
def pool(request):
    name, heads = request.param
    code = load(name, [*heads.kernels, "cos_sin"])
    yield heads, code
    del code


class Bench:
    """A cache with scattered blocks, and steps over it. Rows of a step: (slot, position)."""

    def __init__(self, pool, window=0, filled=0, norms=True):
        self.heads, code = pool
        self.write, self.attend = (code.function(kernel) for kernel in self.heads.kernels)
        self.fill_cos_sin, self.window = code.function("cos_sin"), window
        self.cache = np.full((BLOCKS, KV_HEADS, self.heads.pages.size), filled, np.uint8)
        self.tables = np.random.default_rng(9).permutation(BLOCKS).astype(np.int32).reshape(4, -1)
        rng = np.random.default_rng(3)
        self.norms = [rng.uniform(0.5, 1.5, self.heads.dim).astype(np.float32) if norms else None for _ in "qk"]
        self.sinks = rng.normal(size=self.heads.group * KV_HEADS).astype(np.float32)
        self.rope = rope_of(self.heads.dim)
        self.frequencies = frequencies(self.rope, CONTEXT)
        self.kept = self.heads.group * self.heads.dim * KV_HEADS

    def step(self, rows, x, threads=1, quantize=False):
        """Run a step for `x` (rows, q | k | v) and return (rows, width); int8: (codes, scales)."""
        heads, n = self.heads, len(rows)
        x = matrix(x)
        slots, positions = (np.array(column, np.int64) for column in zip(*rows, strict=True))
        begins = [i for i in range(n) if not i or slots[i] != slots[i - 1]]
        first, count = [], []
        for a, b in zip(begins, [*begins[1:], n], strict=True):
            first += range(a, b, heads.item_rows)
            count += [min(heads.item_rows, b - r) for r in range(a, b, heads.item_rows)]
        first, count = np.array(first, np.int64), np.array(count, np.int64)
        cos_sin = np.zeros((n, cos_sin_stride(self.rope.rotary_dim // 2) // 4), np.float32)
        out = np.zeros((n, self.kept), np.int8 if quantize else np.float32)
        out_scales = np.zeros((n, self.kept // 32, 2), np.float32)
        pairs = heads.group * heads.item_rows
        scratch = {
            t.TILE: np.zeros((threads, pairs * heads.dim * 4), np.uint8),
            t.SCORES: np.zeros((threads, t.SCORE_ROWS, CONTEXT * 4), np.uint8),
            t.ROW: np.zeros((threads, pairs * PAIR_BYTES), np.uint8),
        }
        context = {
            **{column: address(array) for column, array in scratch.items()},
            t.TILE_SIZE: scratch[t.TILE].strides[0],
            t.ROW_SIZE: scratch[t.ROW].strides[0],
            t.SCORES_SIZE: CONTEXT * 4,
            t.TOKENS: n,
            t.ITEMS: len(first),
            t.SINGLE_TOKEN: len(set(slots)) == n,
            t.TABLES: address(self.tables),
            t.TABLE_STRIDE: self.tables.strides[0],
            t.POSITIONS: address(positions),
            t.SEQUENCES: address(slots),
            t.FIRST: address(first),
            t.COUNT: address(count),
        }
        half = self.rope.rotary_dim // 2
        cos_sin_row = {t.OUT: address(cos_sin), t.OUT_STRIDE: cos_sin.strides[0], t.ROPE_HALF: half}
        cos_sin_row |= {t.FREQUENCIES: address(self.frequencies), t.MAGNITUDE: t.float_bits(1.0)}
        assert walk(self.fill_cos_sin, cos_sin_row, context, threads) == 1
        row = {
            t.X: address(x),
            t.X_STRIDE: x.strides[0],
            t.KEY_STRIDE: x.strides[0],
            t.VALUE_STRIDE: x.strides[0],
            t.WIDTH: KV_HEADS,
            t.OUT: address(out),
            t.OUT_STRIDE: out.strides[0],
            t.CACHE: address(self.cache),
            t.PAGE_STRIDE: self.cache.strides[0],
            t.OUT_SCALES: address(out_scales) if quantize else 0,
            t.KEYS: address(x) + self.kept * 4,
            t.VALUES: address(x) + (self.kept + KV_HEADS * heads.dim) * 4,
            t.ROPE: address(cos_sin),
            t.ROPE_HALF: half,
            t.ROPE_STRIDE: cos_sin.strides[0],
            t.ATTENTION_SCALE: t.float_bits(0.3),
            t.ATTENTION_CAP: t.float_bits(CAP),
            t.WINDOW: self.window,
            t.HEAD_EPS: t.float_bits(EPS),
            t.SINKS: address(self.sinks),
            **{c: 0 if w is None else address(w) for c, w in zip((t.Q_NORM, t.K_NORM), self.norms, strict=True)},
        }
        assert walk(self.write, row, context, threads) == context[t.SINGLE_TOKEN]
        assert walk(self.attend, row, context, threads) == 0
        return (out, out_scales) if quantize else out

    def reference(self, x):
        """Return attention over one sequence from its beginning, in float64."""
        heads, n = self.heads, len(x)
        q, k, v = np.split(x.astype(np.float64), [self.kept, self.kept + KV_HEADS * heads.dim], 1)
        q, k = (self._turned(a.reshape(n, -1, heads.dim), w) for a, w in zip((q, k), self.norms, strict=True))
        k, v = self._stored(k), self._stored(v.reshape(n, -1, heads.dim))
        out = np.zeros_like(q)
        behind = np.arange(n)[:, None] - np.arange(n)
        hidden = (behind < 0) | (behind >= self.window) if self.window else behind < 0
        for h in range(q.shape[1]):
            s = q[:, h] @ k[:, h // heads.group].T * np.float32(0.3)
            s = np.where(hidden, -np.inf, CAP * np.tanh(s / CAP) if heads.capped else s)
            top = s.max(-1, keepdims=True)
            p, sink = np.exp(s - top), np.exp(self.sinks[h] - top) if heads.sinks else 0
            out[:, h] = p / (p.sum(-1, keepdims=True) + sink) @ v[:, h // heads.group]
        return out.reshape(n, -1)

    def _turned(self, heads, weight):
        if weight is not None:
            heads = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + EPS) * weight
        half = self.rope.rotary_dim // 2
        angle = np.arange(len(heads), dtype=np.float32)[:, None] * self.rope.inverse_frequencies()
        cos, sin = (f(angle.astype(np.float64))[:, None] for f in (np.cos, np.sin))
        a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def _stored(self, heads):
        if self.heads.form == "f16":
            return heads.astype(np.float16).astype(np.float64)
        scale = np.abs(heads).max(-1, keepdims=True) / 127
        return np.rint(heads / scale) * scale


def tokens(bench, n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, bench.kept + 2 * KV_HEADS * bench.heads.dim)) * 0.7


@pytest.mark.parametrize("window", [0, 21])
def test_a_prompt_attends_as_numpy_does(pool, window):
    bench = Bench(pool, window, filled=61)  # stale pages
    x = tokens(bench, 70)
    made = bench.step([(1, p) for p in range(70)], x)
    # a key on the edge between two codes may be stored as the other one
    bound = 2e-3 if bench.heads.form == "f16" else 1e-2
    np.testing.assert_allclose(made, bench.reference(x), atol=bound)


@pytest.mark.parametrize("window", [0, 21])
def test_no_bit_depends_on_chunks_batch_or_threads(pool, window):
    whole, n = Bench(pool, window), 70
    xs = [tokens(whole, n, seed) for seed in range(3)]
    once = [whole.step([(slot, p) for p in range(n)], x) for slot, x in enumerate(xs)]
    pieces = Bench(pool, window, filled=17)  # other stale pages
    done = [[], [], []]
    for a, b in ((0, 17), (17, 33), (33, 50), (50, 51)):  # chunks of three sequences in a step
        rows = [(slot, p) for slot in range(3) for p in range(a, b)]
        made = pieces.step(rows, np.concatenate([x[a:b] for x in xs]), threads=2)
        for slot in range(3):
            done[slot].append(made[slot * (b - a) : (slot + 1) * (b - a)])
    for p in range(51, n):  # decode: together, then alone, then mixed with a chunk of another
        if p < 60:
            made = pieces.step([(slot, p) for slot in range(3)], np.stack([x[p] for x in xs]), threads=2)
            for slot in range(3):
                done[slot].append(made[slot : slot + 1])
        else:
            done[0].append(pieces.step([(0, p)], xs[0][p : p + 1]))
            done[1].append(pieces.step([(1, p), (3, 0), (3, 1)], np.stack([xs[1][p], *xs[2][:2]]))[:1])
            done[2].append(pieces.step([(3, 0), (3, 1), (2, p)], np.stack([*xs[2][:2], xs[2][p]]), threads=2)[2:])
    for slot in range(3):
        assert (np.concatenate(done[slot]) == once[slot]).all()


def test_an_int8_result_is_the_float_result_quantized(pool):
    bench = Bench(pool)
    if bench.heads.group * bench.heads.dim % 32:
        pytest.skip("its items are no whole blocks of 32")
    x = tokens(bench, 20)
    rows = [(0, p) for p in range(20)]
    codes, scales = quantized(bench.step(rows, x))
    made, made_scales = bench.step(rows, x, quantize=True)
    assert np.abs(made.astype(int) - codes).max() <= 1  # x · (127 / max) rounds once more than x / scale
    assert (made != codes).mean() < 1e-3
    np.testing.assert_allclose(made_scales[..., 0], scales[..., 0], rtol=1e-6)
    sums = made.reshape(20, -1, 32).astype(np.float32).sum(-1)
    np.testing.assert_allclose(made_scales[..., 1], made_scales[..., 0] * sums, rtol=1e-6)


def test_numbers_that_are_none_stay_in_their_sequence(pool):
    bench = Bench(pool, norms=False)
    bad = tokens(bench, 20)
    bad[3], bad[7], bad[11] = np.nan, np.inf, 1e30
    bench.step([(2, p) for p in range(20)], bad)
    x = tokens(bench, 5, 1)
    again, fresh = (b.step([(2, p) for p in range(5)], x) for b in (bench, Bench(pool, norms=False)))
    assert (again == fresh).all()


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {"rope_type": "factors", "factors": [1.0 + i / 8 for i in range(28)]},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    ],
    ids=lambda s: s["rope_type"] if s else "default",
)
def test_cosines_and_sines_are_right_at_every_position(pool, scaling):
    table = RopeTable.of(56, 1e4, 1024, scaling)
    positions = np.array([0, 1, 2, 1023, 1024, 5000, 131071, 1000003], np.int64)
    if table.moves:
        positions = np.minimum(positions, 5000)
    inverse = frequencies(table, 5001)
    stride = cos_sin_stride(28)
    cos_sin = np.full((len(positions), stride // 4), 7, np.float32)
    row = {t.OUT: address(cos_sin), t.OUT_STRIDE: stride, t.ROPE_HALF: 28, t.MAGNITUDE: t.float_bits(table.magnitude())}
    row |= {t.FREQUENCIES: address(inverse), t.FREQUENCY_STRIDE: inverse.strides[0] if table.moves else 0}
    walk(pool[1].function("cos_sin"), row, {t.TOKENS: len(positions), t.POSITIONS: address(positions)}, 2)
    found = table.frequencies_at(positions) if table.moves else table.inverse_frequencies()
    angle = (positions.astype(np.float32)[:, None] * found).astype(np.float64)
    for at, function in ((0, np.cos), (32, np.sin)):
        np.testing.assert_allclose(cos_sin[:, at : at + 28], function(angle) * table.magnitude(), atol=2e-7)
