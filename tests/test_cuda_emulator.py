"""The emulator: each instruction against NumPy, with fragments laid out as the PTX ISA says."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cuda_emulator import ORDERS, PARTS
from inputs import DTYPES

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4
"""groupID and threadID_in_group of the PTX ISA."""
KINDS = {"bf16": "bfloat16", "f16": "float16"}

pytestmark = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def kernels(emulated):
    return emulated((PARTS / "kernels.cu").read_text())


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def halves(pairs):
    """Registers of two 16-bit elements, the first in the lower half, from elements [..., registers, 2]."""
    return np.ascontiguousarray(pairs).view(np.uint32)[..., 0]


@pytest.mark.parametrize("kind", KINDS)
def test_mma(kernels, rng, order, kind):
    a, b = (rng.uniform(-1, 1, shape).astype(DTYPES[KINDS[kind]]) for shape in ((16, 16), (16, 8)))
    c = rng.uniform(-1, 1, (16, 8)).astype(np.float32)
    i = np.arange(8)
    a_row = np.where((i < 2) | (i >= 4) & (i < 6), GROUP[:, None], GROUP[:, None] + 8)
    a_column = MEMBER[:, None] * 2 + i % 2 + np.where(i >= 4, 8, 0)
    i = np.arange(4)
    b_row = MEMBER[:, None] * 2 + i % 2 + np.where(i >= 2, 8, 0)
    c_row, c_column = np.where(i < 2, GROUP[:, None], GROUP[:, None] + 8), MEMBER[:, None] * 2 + i % 2
    d = np.zeros((32, 4), np.float32)
    fragment_a, fragment_b = a[a_row, a_column], b[b_row, GROUP[:, None]]
    kernels[f"mma_{kind}"].launch(
        1, 32, 0, halves(fragment_a.reshape(32, 4, 2)), halves(fragment_b.reshape(32, 2, 2)), c[c_row, c_column], d,
        order=order,
    )  # fmt: skip
    expected = a.astype(np.float64) @ b.astype(np.float64) + c
    np.testing.assert_allclose(d, expected[c_row, c_column], rtol=0, atol=3e-6)


@pytest.mark.parametrize(("form", "count", "transposed"), [(i, 1 << i // 2, i % 2) for i in range(6)])
def test_ldmatrix(kernels, rng, order, form, count, transposed):
    matrix = rng.integers(0, 1 << 16, (32, 8)).astype(np.uint16)
    rows = rng.permutation(32).astype(np.int32)
    out = np.zeros((6, 32, 4), np.uint32)
    kernels["ldmatrix"].launch(1, 32, 0, matrix, rows, out, order=order)
    for i in range(count):
        tile = matrix[rows[8 * i : 8 * i + 8]]
        tile = tile.T if transposed else tile
        pairs = np.stack([tile[GROUP, 2 * MEMBER], tile[GROUP, 2 * MEMBER + 1]], axis=-1)
        np.testing.assert_array_equal(out[form, :, i], halves(pairs))


@pytest.mark.parametrize(("stride", "conflicts"), [(1, 0), (2, 1), (4, 3), (8, 3), (0, 0), (3, 0)])
def test_bank_conflicts(kernels, order, stride, conflicts):
    """Rows of 16 bytes, of which 8 lie side by side in the banks; a row that is read twice is no conflict."""
    before = kernels["ldmatrix"].bank_conflicts
    rows = (np.arange(32) * stride % 32).astype(np.int32)
    kernels["ldmatrix"].launch(
        1, 32, 0, np.zeros((32, 8), np.uint16), rows, np.zeros((6, 32, 4), np.uint32), order=order
    )
    assert kernels["ldmatrix"].bank_conflicts - before == conflicts * 2 * (1 + 2 + 4)


def test_movmatrix(kernels, rng, order):
    matrix = rng.integers(0, 1 << 16, (8, 8)).astype(np.uint16)
    out = np.zeros(32, np.uint32)
    kernels["movmatrix"].launch(1, 32, 0, halves(matrix.reshape(32, 2)), out, order=order)
    np.testing.assert_array_equal(out, halves(matrix.T.reshape(32, 2)))


def test_conversions(kernels, rng, order):
    """Against ml_dtypes and NumPy: ties, the largest, subnormals, infinities. exp2 flushes subnormals to 0."""
    x = np.concatenate(
        [
            rng.uniform(-150, 150, 1000),
            np.exp2(rng.uniform(-30, 20, 2000)),
            1 + np.arange(64) / 4096,
            [0.0, -0.0, np.inf, -np.inf, 65504, 65519, 65520, -1e9, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 3.3e38],
        ]
    ).astype(np.float32)
    n = len(x) // 2
    bf16, f16, power = np.zeros(n, np.uint32), np.zeros(n, np.uint32), np.zeros(n, np.float32)
    kernels["convert"].launch(1, 32, 0, x, bf16, f16, power, n, order=order)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(bf16.view(np.uint16), x.astype(ml_dtypes.bfloat16).view(np.uint16))
        np.testing.assert_array_equal(f16.view(np.uint16), x.astype(np.float16).view(np.uint16))
        expected = np.exp2(x[:n])
    np.testing.assert_allclose(power, np.where(expected < 2.0**-126, 0, expected), rtol=3e-7)


def test_conversions_of_nan(kernels, order):
    x, out = np.full(2, np.nan, np.float32), [np.zeros(1, np.uint32) for _ in range(2)]
    kernels["convert"].launch(1, 32, 0, x, *out, np.zeros(1, np.float32), 1, order=order)
    assert [int(word[0]) for word in out] == [0x7FFF7FFF] * 2


def test_codes(kernels, order):
    """Pairs of float8 as float16, those of float16 of all bits, and bytes of two words in another order."""
    low = np.arange(1 << 16, dtype=np.uint32)
    x, y = low | (low * 40503 & 0xFFFF) << 16, low * 31 + 7 & 0xFFFF | (low * 77 & 0xFFFF) << 16
    out = np.zeros((4, len(low)), np.uint32)
    kernels["codes"].launch(1, 32, 0, x, y, out, len(low), order=order)
    float8 = x.view(np.uint8).reshape(-1, 4)[:, :2].view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(out[0].view(np.float16).reshape(-1, 2), float8.astype(np.float16))
    assert (np.signbit(out[0].view(np.float16)) == np.signbit(float8).ravel())[~np.isnan(float8).ravel()].all()
    one, other = x.view(np.float16), y.view(np.float16)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out[1].view(np.float16), one - other)
        np.testing.assert_array_equal(out[2].view(np.float16), one * other)
    both = np.stack([x, y], axis=1).view(np.uint8).reshape(-1, 8)
    np.testing.assert_array_equal(out[3].view(np.uint8).reshape(-1, 4), both[:, [5, 0, 7, 2]])


def test_types(kernels, rng, order):
    """Every bfloat16 and every half, by the operators that the C++ types have."""
    a = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    b = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halved, product, total = b.copy(), np.zeros_like(a), np.zeros(1 << 16, np.float32)
    kernels["types"].launch(1, 32, 0, a, halved, product, total, len(a), order=order)
    with np.errstate(all="ignore"):
        wide_a, wide_b = a.astype(np.float32), b.astype(np.float32)
        expected = (wide_a * wide_a[::-1]).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(product.astype(np.float32), expected.astype(np.float32))
        np.testing.assert_array_equal(total, wide_a + wide_b)
        np.testing.assert_array_equal(halved, (wide_b / 2).astype(np.float16))


def test_loads(kernels, rng, order):
    words, out = rng.integers(0, 1 << 32, 128).astype(np.uint32), np.zeros(256, np.uint32)
    kernels["loads"].launch(1, 32, 0, words, out, 0, order=order)
    np.testing.assert_array_equal(out[:128], words)
    np.testing.assert_array_equal(out[128:].reshape(32, 4), words.reshape(32, 4)[:, ::-1])


def test_shuffles_and_votes(kernels, rng, order):
    t, x = np.arange(64), rng.integers(0, 1000, 64).astype(np.int32)
    f = rng.uniform(0, 1, 64).astype(np.float32)
    out, sums = np.zeros((8, 64), np.int32), np.zeros(64, np.float32)
    kernels["shuffles"].launch(1, 64, 0, x, f, out, sums, order=order)
    np.testing.assert_array_equal(out[0], x[t ^ 5])
    np.testing.assert_array_equal(out[1], x[t // 8 * 8 + t // 2 % 8])
    np.testing.assert_array_equal(out[2], np.where(t % 16 >= 3, x[t - 3], x))
    np.testing.assert_array_equal(out[3], np.where(t % 16 < 13, x[(t + 3) % 64], x))
    ballots = [sum(int(v % 3 == 0) << lane for lane, v in enumerate(warp)) for warp in x.reshape(2, 32)]
    np.testing.assert_array_equal(out[4].view(np.uint32), np.repeat(ballots, 32).astype(np.uint32))
    np.testing.assert_array_equal(out[5], np.repeat((x.reshape(2, 32) == 0).any(1) + 2, 32))
    np.testing.assert_array_equal(out[6], np.where(t % 32 < 8, x[t ^ 1], 0))
    np.testing.assert_array_equal(out[7], np.repeat(x.reshape(2, 32).sum(1), 32))
    np.testing.assert_allclose(sums, np.repeat(f.reshape(2, 32).sum(1, dtype=np.float64), 32), rtol=1e-6)


def test_copies(kernels, rng, order):
    """Of 4, 8, 12 of 16, by odd lanes, and 16 bytes."""
    words, out = rng.integers(0, 1 << 32, (32, 12)).astype(np.uint32), np.zeros((32, 16), np.uint32)
    kernels["copies"].launch(1, 32, 2048, words, out, order=order)
    poison = np.uint32(0xFFFFFFFF)
    expected = np.full((32, 16), poison)
    expected[:, 0], expected[:, 2:4] = words[:, 0], words[:, 2:4]
    expected[1::2, 4:7], expected[1::2, 7] = words[1::2, 4:7], 0
    expected[:, 8:12], expected[:, 12:] = words[:, 8:12], 0
    np.testing.assert_array_equal(out, expected)


def test_blocks_barriers_and_atomics(kernels, rng, order):
    x = rng.integers(0, 1000, 5000).astype(np.int32)
    pairs, total, largest = np.zeros((7, 2), np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32)
    kernels["sums"].launch(7, 128, 0, x, pairs, total, largest, len(x), order=order)
    padded = np.zeros(6 * 7 * 128, np.int32)
    padded[: len(x)] = x
    expected = padded.reshape(6, 7, 2, 64).sum((0, 3))
    np.testing.assert_array_equal(pairs, expected)
    assert (total[0], largest[0]) == (x.sum(), expected[:, 0].max())


def test_indices(kernels, order):
    out = np.zeros(6 * 24, np.int32)
    kernels["indices"].launch((3, 1, 2), (2, 3, 4), 0, out, order=order)
    np.testing.assert_array_equal(out.reshape(6, 24), 1000 * np.arange(6)[:, None] + np.arange(24))
