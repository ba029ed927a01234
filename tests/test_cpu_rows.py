"""The CPU backend's kernels over rows, against numpy, under every instruction set that the machine can run."""

import math

import numpy as np
import pytest
from support_kernels import ISAS, address, load, matrix, quantized, walk

from tokenmill.backends.cpu import layout as t

NAMES = ["norm", "add_norm", "add", "act", "gated_act", "soft_cap", "scale", "take_rows", "quantize_rows", "rope"]
NAMES += ["xielu", "scale_by_position"]
ROWS, WIDTH, EPS = 7, 576, 1e-5


@pytest.fixture(scope="module", params=ISAS)
def code(request):
    loaded = load(request.param, NAMES)
    yield loaded
    del loaded


def from_to(x, out, scales=None):
    """Return the column ranges of every kind."""
    return {
        t.X: address(x),
        t.X_STRIDE: x.strides[0],
        t.WIDTH: x.shape[1],
        t.OUT: address(out),
        t.OUT_STRIDE: out.strides[0],
        t.OUT_SCALES: 0 if scales is None else address(scales),
    }


def normed(x, weight, bias=None):
    x = x.astype(np.float64)
    if bias is None:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight + bias


def norm_columns(rng, width, center):
    weight, bias = (rng.standard_normal(width).astype(np.float32) for _ in range(2))
    words = {t.NORM_WEIGHT: address(weight), t.NORM_EPS: t.float_bits(EPS), t.CENTER: center}
    return weight, bias if center else None, words | {t.NORM_BIAS: address(bias) if center else 0}


@pytest.mark.parametrize("center", [0, 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_norm(code, rng, center, threads):
    x = matrix(rng.standard_normal((ROWS, WIDTH)) * 3 + 1)
    out, (weight, bias, words) = np.zeros_like(x), norm_columns(rng, WIDTH, center)
    assert walk(code.function("norm"), from_to(x, out) | words, {t.TOKENS: ROWS}, threads) == 0
    np.testing.assert_allclose(out, normed(x, weight, bias), atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("center", [0, 1])
def test_norm_to_int8_is_the_norm_quantized(code, rng, center):
    x = matrix(rng.standard_normal((ROWS, WIDTH)))
    x[2] = 0
    out, codes, scales = np.zeros_like(x), np.zeros(x.shape, np.int8), np.zeros((ROWS, WIDTH // 32, 2), np.float32)
    *held, words = norm_columns(rng, WIDTH, center)
    walk(code.function("norm"), from_to(x, out) | words, {t.TOKENS: ROWS})
    walk(code.function("norm"), from_to(x, codes, scales) | words, {t.TOKENS: ROWS})
    expected, expected_scales = quantized(out)
    assert (codes == expected).all()
    np.testing.assert_allclose(scales, expected_scales, rtol=1e-6)
    assert held is not None


def test_norm_of_each_head(code, rng):
    x = matrix(rng.standard_normal((ROWS, 6 * 64)))
    weight, _, words = norm_columns(rng, 64, 0)
    walk(code.function("norm"), from_to(x, x) | words | {t.WIDTH: 64, t.HEADS: 6}, {t.TOKENS: ROWS})
    again = matrix(np.random.default_rng(0).standard_normal((ROWS, 6 * 64)))
    np.testing.assert_allclose(x.reshape(-1, 64), normed(again.reshape(-1, 64), weight), atol=3e-6, rtol=3e-6)


def test_every_thread_has_a_norm_of_its_own_if_rows_are_few(code, rng):
    x = matrix(rng.standard_normal((t.FEW, WIDTH)))
    weight, _, words = norm_columns(rng, WIDTH, 0)
    codes, scales = np.zeros((2, t.FEW, WIDTH), np.int8), np.zeros((2, t.FEW, WIDTH // 32, 2), np.float32)
    row = from_to(x, codes, scales) | words | {t.PRIVATE_OUT: 1, t.ROWS: 1, t.OUT_STRIDE: WIDTH}
    assert walk(code.function("norm"), row, {t.SAMPLES: t.FEW}, 2) == 1
    expected, expected_scales = quantized(normed(x, weight).astype(np.float32))
    for mine in range(2):
        assert np.abs(codes[mine].astype(int) - expected).max() <= 1
        np.testing.assert_allclose(scales[mine][..., 0], expected_scales[..., 0], rtol=1e-5)
    assert (codes[0] == codes[1]).all()


def test_add_norm_keeps_the_sum(code, rng):
    x, y = (matrix(rng.standard_normal((ROWS, WIDTH))) for _ in range(2))
    total = x + y
    out, (weight, _, words) = np.zeros_like(x), norm_columns(rng, WIDTH, 0)
    words |= {t.Y: address(y), t.Y_STRIDE: y.strides[0], t.TOTAL: address(x), t.TOTAL_STRIDE: x.strides[0]}
    walk(code.function("add_norm"), from_to(x, out) | words, {t.TOKENS: ROWS}, 2)
    assert (x == total).all()
    np.testing.assert_allclose(out, normed(total, weight), atol=3e-6, rtol=3e-6)


def test_add(code, rng):
    x, y = (matrix(rng.standard_normal((ROWS, 40))) for _ in range(2))
    out = np.zeros_like(x)
    walk(code.function("add"), from_to(x, out) | {t.Y: address(y), t.Y_STRIDE: y.strides[0]}, {t.TOKENS: ROWS}, 2)
    assert (out == x + y).all()


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


ACTS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": gelu,
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("act", ACTS)
def test_activations(code, rng, act):
    x = matrix(np.concatenate([rng.standard_normal((ROWS, 90)) * 4, np.full((ROWS, 3), [-80.0, 80.0, 0.0])], 1))
    y, out, gated = matrix(rng.standard_normal(x.shape)), np.zeros_like(x), np.zeros_like(x)
    words = {t.ACT: t.ACTS[act], t.Y: address(y), t.Y_STRIDE: y.strides[0]}
    walk(code.function("act"), from_to(x, out) | words, {t.TOKENS: ROWS}, 2)
    walk(code.function("gated_act"), from_to(x, gated) | words, {t.TOKENS: ROWS}, 2)
    expected = ACTS[act](x.astype(np.float64))
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-6)
    np.testing.assert_allclose(gated, expected * y, atol=5e-6, rtol=5e-6)


def test_a_row_times_a_constant(code, rng):
    x = matrix(rng.standard_normal((3, 5000)))
    out = np.zeros_like(x)
    words = {t.FACTOR: t.float_bits(-0.3)}
    walk(code.function("scale"), from_to(x, out) | words, {t.TOKENS: 3}, 2)
    np.testing.assert_array_equal(out, x * np.float32(-0.3))


def test_soft_cap(code, rng):
    x = matrix(rng.standard_normal((3, 5000)) * 40)
    out = np.zeros_like(x)
    walk(code.function("soft_cap"), from_to(x, out) | {t.FACTOR: t.float_bits(30.0)}, {t.TOKENS: 3}, 2)
    np.testing.assert_allclose(out, 30 * np.tanh(x.astype(np.float64) / 30), atol=1e-5)


def test_xielu_has_a_slope_on_each_side_of_zero(code, rng):
    x, above, below = matrix(rng.standard_normal((3, 1100)) * 3), 0.8, 1.3
    x[1, :3] = 0, -1e-3, -80
    out = np.zeros_like(x)
    words = {t.FACTOR: t.float_bits(above) | t.float_bits(below) << 32}
    walk(code.function("xielu"), from_to(x, out) | words, {t.TOKENS: 3}, 2)
    wide = x.astype(np.float64)
    expected = np.where(x > 0, above * wide**2, below * (np.expm1(np.minimum(wide, -1e-6)) - wide)) + 0.5 * wide
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_a_row_grows_with_its_position(code, rng):
    x, positions = matrix(rng.standard_normal((ROWS, 40))), np.arange(ROWS) * 5
    out, factors = np.zeros_like(x), (1 + np.arange(8)).astype(np.float32)
    words = {t.POSITION_FACTORS: address(factors), t.LENGTH: 6, t.POSITION_OFFSET: 4}
    context = {t.TOKENS: ROWS, t.POSITIONS: address(positions)}
    walk(code.function("scale_by_position"), from_to(x, out) | words, context, 2)
    np.testing.assert_array_equal(out, x * factors[(positions + 4) // 6][:, None])


def test_rows_that_sample_are_taken(code, rng):
    x, places = matrix(rng.standard_normal((ROWS, 40))), np.array([1, 4, 6], np.int64)
    out = np.zeros((3, x.shape[1]), np.float32)
    row = from_to(x, out) | {t.ROWS: 1}
    walk(code.function("take_rows"), row, {t.TOKENS: ROWS, t.SAMPLES: 3, t.SAMPLED: address(places)}, 2)
    assert (out == x[places]).all()


def test_quantizing(code, rng):
    x = matrix(rng.standard_normal((ROWS, WIDTH)) * 10.0 ** rng.integers(-30, 30, (ROWS, 1)))
    x[1, :32] = 0
    codes, scales = np.zeros(x.shape, np.int8), np.zeros((ROWS, WIDTH // 32, 2), np.float32)
    walk(code.function("quantize_rows"), from_to(x, codes, scales), {t.TOKENS: ROWS}, 2)
    expected, expected_scales = quantized(x)
    assert (codes == expected).all()
    np.testing.assert_allclose(scales, expected_scales, rtol=1e-6)
    assert np.abs(codes * np.repeat(scales[..., 0], 32, 1) - x).max(-1).max() <= np.abs(x).max() / 254 * 1.001


def test_heads_are_turned(code, rng):
    x, half = matrix(rng.standard_normal((ROWS, 3 * 32))), 11  # no whole vectors
    out = np.zeros_like(x)
    cos_sin = rng.standard_normal((ROWS, 2, 16)).astype(np.float32)
    words = {t.ROPE: address(cos_sin), t.ROPE_HALF: half, t.ROPE_STRIDE: cos_sin.strides[0], t.HEAD_DIM: 32, t.HEADS: 3}
    walk(code.function("rope"), from_to(x, out) | words, {t.TOKENS: ROWS}, 2)
    cos, sin = (cos_sin[:, None, i, :half] for i in range(2))
    heads = x.reshape(ROWS, 3, 32)
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    expected = np.concatenate([a * cos - b * sin, a * sin + b * cos, rest], -1).reshape(ROWS, -1)
    np.testing.assert_allclose(out, expected, atol=1e-6)
