"""The oracle's gradient stages against cases worked out by hand from section 4 of ALGORITHM.md, and its claims."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.oracle.stages import (
    Array,
    PercentileClip,
    encourage_low_rank,
    initial_edge_history,
    suppress_edges,
    suppress_high_frequencies,
)

ROUNDINGS = 1e-12  # relative: some thousand float64 roundings of 1e-16
EDGES: dict[str, Any] = {"penalty": 0.1, "threshold": 0.5}
RANK: dict[str, Any] = {"strength": 0.3, "emphasis": 1.2}


def to_flax(x: Array) -> Array:
    """(out, in, *spatial) -> (*spatial, in, out)."""
    return x.transpose(*range(2, x.ndim), 1, 0)


def edges_over(grads: list[Array], layout: str = "torch", embedding: bool = False, **changes: Any) -> list[Array]:
    """The stage over successive steps, from an empty history."""
    history = initial_edge_history(grads[0].shape, layout, embedding)
    results = []
    for age, g in enumerate(grads, start=1):
        g, history = suppress_edges(g, history, age, layout=layout, embedding=embedding, **EDGES | changes)
        results.append(g)
    return results


# ---------------------------------------------------------------- clip_by_percentile


def test_clip_by_hand() -> None:
    small, large = [np.array([[2.0]]), None, np.zeros(3)], [np.array([[0.0]]), np.array([4.0]), None]
    fine = [False] * 3
    for percentile, until in ((50, 49), (1, 98)):
        clip = PercentileClip(percentile)
        assert clip([np.zeros((1, 1)), None, np.zeros(3)], fine)[0] == 0  # 0 is not recorded
        assert clip(large, [True, False, False])[1] == 4  # nor is a step with an array skipped
        assert clip(small, fine)[0] == 2  # this one fills the ring with 100 times 4
        for k in range(1, 120):
            # k values of 16, then fours: the P-th entry of the sorted ring is 16 once 100 - k <= P.
            assert clip(large, fine)[1] == (2 if k <= until else 4), (percentile, k)
            assert clip(large, [False, True, False])[1] == 4
        assert clip(small, fine)[0] == 2
    off = PercentileClip(100)
    assert all(off([np.array(x)], [False]) == [x] for x in (1.0, 5.0))
    assert not off.ring
    two = PercentileClip(50)
    two([np.array(3.0), np.array(4.0)], [False] * 2)
    found = two([np.array(6.0), np.array(-8.0)], [False] * 2)  # one norm of all: 10, the median 5
    assert found == [pytest.approx(3), pytest.approx(-4)]


# ---------------------------------------------------------------- suppress_edges


def test_a_spike_by_hand() -> None:
    centre, corner = np.zeros((3, 3)), np.zeros((3, 3))
    centre[1, 1] = corner[0, 0] = 8
    # |L| is 32 in the centre and 8 beside it; the rows' means are 8/3, 16, 8/3, their thresholds 4, 24, 4.
    first = [[0, 0.4, 0], [0, 7.2, 0], [0, 0.4, 0]]
    # In the corner two neighbours are the corner itself: |L| = 16, and 8 beside it. The histories 0.9 * 0.1 * old
    # + 0.1 * (8, 8/3, 0) are 1.04, 1.44 + 0.8/3, 0.24, to be divided by 1 - 0.81 and multiplied by 1.5.
    thresholds = [1.5 * h / 0.19 for h in (1.04, 1.44 + 0.8 / 3, 0.24)]
    assert thresholds[0] > 8
    assert thresholds[1] > 8
    second = [[8 - 0.1 * (16 - thresholds[0]), 0, 0], [0, 0, 0], [0, 0, 0]]
    found = edges_over([centre, corner])
    np.testing.assert_allclose(np.array(found), np.array([first, second]), rtol=ROUNDINGS, atol=1e-15)
    # The rows of a (in, out) kernel are its columns; an embedding keeps axis 0.
    np.testing.assert_array_equal(edges_over([centre, corner.T], "flax"), [np.transpose(x) for x in found])
    np.testing.assert_array_equal(edges_over([centre, corner], "flax", embedding=True), found)


def test_a_row_of_a_convolution_is_its_output_feature() -> None:
    g = np.zeros((2, 2, 3, 3))
    g[0, 0, 1, 1], g[1] = 8, 5
    expected = g.copy()
    threshold = 1.5 * 64 / 18  # the mean of |L| over both inputs of output 0
    expected[0, 0, 1, 1] -= 0.1 * (32 - threshold)
    expected[0, 0, [0, 1, 1, 2], [1, 0, 2, 1]] = 0.1 * (8 - threshold)
    np.testing.assert_allclose(edges_over([g])[0], expected, rtol=ROUNDINGS)


@pytest.mark.parametrize("shape", [(7,), (9, 2), (2, 9), (4, 5, 6), (5, 5, 3, 2), (0, 3, 4, 4)])
def test_arrays_that_are_left_alone(shape: tuple[int, ...]) -> None:
    g = np.random.default_rng(0).normal(size=shape)
    assert initial_edge_history(shape, "torch") is None
    assert suppress_edges(g, None, 1, layout="torch", **EDGES) == (g, None)
    assert suppress_high_frequencies(g, layout="torch", penalty=0.5) is g
    # Which axes are spatial depends on the layout: the same shape may have them long enough in the other.
    assert (initial_edge_history(shape, "flax") is None) == (shape != (5, 5, 3, 2))


@pytest.mark.parametrize("seed", range(4))
def test_no_magnitude_grows_and_constants_stay(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grads = [rng.normal(size=(6, 2, 5, 4)) ** 3 for _ in range(5)]
    constant = np.broadcast_to(rng.normal(size=(6, 2, 1, 1)), (6, 2, 5, 4))  # over the spatial axes
    found = edges_over([*grads, constant], penalty=0.2, threshold=0.0)
    for before, after in zip(grads, found, strict=False):
        assert np.abs(after).max() <= np.abs(before).max()
        assert np.abs(after - before).max() > 0.01
    np.testing.assert_array_equal(found[-1], constant)


# ---------------------------------------------------------------- suppress_high_frequencies


@pytest.mark.parametrize(
    ("n1", "n2", "k1", "k2", "high"),
    [
        (10, 8, 3, 0, False),  # 0.3 itself passes
        (10, 8, 4, 0, True),
        (10, 8, 0, 3, True),
        (10, 8, 1, 2, False),
        (10, 8, 2, 2, True),  # 0.2 and 0.25: the radius counts, not each frequency
        (10, 8, 8, 2, True),  # 8 of 10 is -2
        (10, 8, 9, 2, False),
        (10, 8, 5, 4, True),
        (50, 50, 9, 12, False),  # 0.18² + 0.24² is 0.3² exactly, though not in floating point
        (50, 50, 41, 12, False),
        (50, 50, 10, 12, True),
        (3, 5, 1, 0, True),  # odd lengths: 1/3
        (3, 5, 0, 1, False),
        (3, 5, 0, 2, True),
    ],
)
def test_a_cosine_is_kept_or_damped(n1: int, n2: int, k1: int, k2: int, high: bool) -> None:
    wave = np.cos(2 * np.pi * (k1 * np.arange(n1)[:, None] / n1 + k2 * np.arange(n2) / n2) + 0.4)
    expected = wave * (0.75 if high else 1)
    found = suppress_high_frequencies(wave, layout="torch", penalty=0.25)
    np.testing.assert_allclose(found, expected, atol=ROUNDINGS)


@pytest.mark.parametrize("shape", [(8, 6), (9, 7), (2, 3, 5, 8), (2, 2, 2, 6, 9)])
def test_energy_above_the_cutoff_is_multiplied_and_the_rest_kept(shape: tuple[int, ...]) -> None:
    g = np.random.default_rng(1).normal(size=shape)
    n1, n2 = shape[-2:]
    frequency = [[Fraction(min(k, n - k), n) for k in range(n)] for n in (n1, n2)]
    high = np.array([[100 * (a**2 + b**2) > 9 for b in frequency[1]] for a in frequency[0]])
    assert 0 < high.sum() < high.size
    before, after = (np.fft.fft2(x) for x in (g, suppress_high_frequencies(g, layout="torch", penalty=0.3)))
    np.testing.assert_allclose(after[..., ~high], before[..., ~high], atol=1e-12)
    energy = [np.sum(np.abs(x[..., high]) ** 2) for x in (before, after)]
    assert energy[1] == pytest.approx(0.49 * energy[0], rel=ROUNDINGS)


# ---------------------------------------------------------------- encourage_low_rank


def test_known_singular_values_by_hand() -> None:
    w = np.array([[0.0, 6.0, 0.0], [-2.0, 0.0, 0.0]])
    g = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    # W = w / 6 has eigenvalues 1 and 1/9 of mean 5/9: weights 1 / (1 + 1.8²) and 1 / (1 + 0.2²); δ² = 0.01.
    weak = np.array([25 / 106, 25 / 26])
    t = np.zeros((2, 3))
    t[0, 1] = weak[0] / math.sqrt(1.01)
    t[1, 0] = -weak[1] / 3 / math.sqrt(1 / 9 + 0.01)
    expected = g + 0.2 * (1 - weak)[:, None] * g + 0.3 * math.sqrt(91) / math.hypot(t[0, 1], t[1, 0]) * t
    for layout in ("torch", "flax"):  # the shorter side is first, whichever axis has the rows
        found = encourage_low_rank(g, w, layout=layout, **RANK)
        np.testing.assert_allclose(found, expected, rtol=ROUNDINGS)
        np.testing.assert_allclose(encourage_low_rank(g.T, w.T, layout=layout, **RANK), expected.T, rtol=ROUNDINGS)
    np.testing.assert_array_equal(encourage_low_rank(g, 0 * w, layout="torch", **RANK), g)
    np.testing.assert_array_equal(encourage_low_rank(0 * g, w, layout="torch", **RANK), 0 * g)
    stack = np.ones((2, 3, 4, 4))
    assert encourage_low_rank(stack, stack, layout="torch", **RANK) is stack


def test_a_square_parameter_is_taken_by_its_rows() -> None:
    w, g = np.diag([3.0, 1.0]), np.ones((2, 2))
    only_p: dict[str, Any] = {"strength": 0.0, "emphasis": 2.0}
    scale = np.array([2 - 1 / (1 + 1.8**2), 2 - 1 / (1 + 0.2**2)])
    rows, columns = np.outer(scale, [1, 1]), np.outer([1, 1], scale)
    np.testing.assert_allclose(encourage_low_rank(g, w, layout="torch", **only_p), rows)
    np.testing.assert_allclose(encourage_low_rank(g, w, layout="flax", **only_p), columns)
    np.testing.assert_allclose(encourage_low_rank(g, w, layout="flax", embedding=True, **only_p), rows)


@pytest.mark.parametrize("seed", range(4))
def test_rotations_scales_and_the_gram_matrix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, g = rng.normal(size=(4, 9)) * [[1], [1], [0.3], [1e-3]], rng.normal(size=(4, 9))
    if seed == 3:
        w = np.linalg.qr(w.T)[0].T  # every singular value is the same
    found = encourage_low_rank(g, w, layout="torch", **RANK)
    long, short = np.linalg.qr(rng.normal(size=(9, 9)))[0], np.linalg.qr(rng.normal(size=(4, 4)))[0]
    turned = encourage_low_rank(g @ long, w @ long, layout="torch", **RANK)
    np.testing.assert_allclose(turned, found @ long, atol=1e-11)
    turned = encourage_low_rank(short @ g, short @ w, layout="torch", **RANK)
    np.testing.assert_allclose(turned, short @ found, atol=1e-11)
    np.testing.assert_allclose(encourage_low_rank(g, 1e-200 * w, layout="torch", **RANK), found, atol=1e-11)
    # The page's own way, through the Gram matrix.
    W = w / np.abs(w).max()
    lam, Q = np.linalg.eigh(W @ W.T)
    weak = 1 / (1 + (lam / lam.mean()) ** 2)
    T = Q @ np.diag(weak / np.sqrt(lam + 0.01 * lam.max())) @ Q.T @ W
    P = Q @ np.diag(1 - weak) @ Q.T
    expected = g + 0.2 * P @ g + 0.3 * np.linalg.norm(g) / np.linalg.norm(T) * T
    np.testing.assert_allclose(found, expected, atol=1e-11)


# ---------------------------------------------------------------- all stages


@pytest.mark.parametrize("factor", [1e-8, 3.0, 1e9])
def test_every_stage_is_equivariant_in_the_scale_of_g(factor: float) -> None:
    rng = np.random.default_rng(5)
    grads = [rng.normal(size=(6, 5)) * 10.0 ** rng.uniform(-1, 1) for _ in range(12)]
    w = rng.normal(size=(6, 5))
    scaled = [factor * g for g in grads]
    one, two = PercentileClip(40), PercentileClip(40)
    pairs = [(one([g], [False])[0], two([c], [False])[0]) for g, c in zip(grads, scaled, strict=True)]
    assert any(a is not g for (a, _), g in zip(pairs, grads, strict=True))  # some steps are clipped
    pairs += list(zip(edges_over(grads), edges_over(scaled), strict=True))
    for g, c in zip(grads, scaled, strict=True):
        low = [suppress_high_frequencies(x, layout="torch", penalty=0.4) for x in (g, c)]
        rank = [encourage_low_rank(x, w, layout="torch", **RANK) for x in (g, c)]
        pairs += [(low[0], low[1]), (rank[0], rank[1])]
    for a, b in pairs:
        assert a is not None
        assert b is not None
        np.testing.assert_allclose(b, factor * a, rtol=1e-9, atol=1e-13 * factor * np.abs(a).max())


@pytest.mark.parametrize("shape", [(6, 4), (5, 2, 4, 3), (3, 2, 2, 4, 5)])
def test_the_layouts_are_transposes(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    grads = [rng.normal(size=shape) ** 3 for _ in range(4)]
    w = rng.normal(size=shape)
    flax = [to_flax(g) for g in grads]
    for a, b in zip(edges_over(grads), edges_over(flax, "flax"), strict=True):
        np.testing.assert_allclose(b, to_flax(a), atol=ROUNDINGS)
    for g, h in zip(grads, flax, strict=True):
        low = suppress_high_frequencies(g, layout="torch", penalty=0.4)
        np.testing.assert_allclose(suppress_high_frequencies(h, layout="flax", penalty=0.4), to_flax(low), atol=1e-12)
        rank = encourage_low_rank(g, w, layout="torch", **RANK)
        np.testing.assert_allclose(
            encourage_low_rank(h, to_flax(w), layout="flax", **RANK), to_flax(rank), atol=ROUNDINGS
        )
