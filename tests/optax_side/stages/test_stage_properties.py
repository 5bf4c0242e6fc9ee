"""What can be proved of the gradient stages (section 4), on random gradients and weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from automagic_optax import clip_by_percentile, encourage_low_rank, suppress_edges, suppress_high_frequencies
from automagic_optax.stages.spectrum import directions, gram, narrowed, product, wide_numbers, widened
from tests.optax_side.oracle_runs import relative
from tests.optax_side.stage_runs import weight_of
from tests.oracle import stages as oracle

# A shape is a program: few of them, with lengths even, odd, equal and the least.
pytestmark = pytest.mark.compiled_quickly
SHAPES = [(3, 3), (4, 7), (8, 5)]
SPECTRA = ("full", "repeated values", "half the rank", "rank one", "exactly rank one", "steep")
examples = settings(deadline=None, max_examples=40, derandomize=True)

# Multiples of an eighth: the squares of tiny numbers would leave float32.
pictures = st.sampled_from(SHAPES).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.integers(-8000, 8000).map(lambda n: n / 8))
)
seeds = st.integers(0, 2**31)


def scaled(g: np.ndarray, factor: float) -> np.ndarray:
    return np.asarray(g * np.float32(factor), np.float32)


def one_step(tx: optax.GradientTransformation, g: jax.Array, w: jax.Array | None = None) -> jax.Array:
    return tx.update([g], tx.init([g if w is None else w]), None if w is None else [w])[0][0]


@jax.jit
def edges(g: jax.Array, penalty: Any, threshold: Any) -> jax.Array:
    return one_step(suppress_edges(penalty, threshold), g)


@jax.jit
def frequencies(g: jax.Array, penalty: Any) -> jax.Array:
    return one_step(suppress_high_frequencies(penalty), g)


@jax.jit
def low_rank(g: jax.Array, w: jax.Array, strength: Any, emphasis: Any) -> jax.Array:
    return one_step(encourage_low_rank(strength, emphasis, lora=lambda path, leaf: True), g, w)


@jax.jit
def three_steps(g: jax.Array, w: jax.Array) -> list[jax.Array]:
    """Each stage after two other gradients, so that its history has something to compare with."""
    found = []
    for tx in (
        clip_by_percentile(50),
        suppress_edges(0.2, 0.3),
        suppress_high_frequencies(0.3),
        encourage_low_rank(0.3, 1.5, lora=lambda path, leaf: True),
    ):
        state = tx.init([w])
        for gradient in (g[::-1] / 2, g[:, ::-1] / 4, g):
            (update,), state = tx.update([gradient], state, [w])
        found.append(update)
    return found


@cache
def adapter(shape: tuple[int, int]) -> np.ndarray:
    return weight_of("full", shape, np.random.default_rng(0))


@examples
@given(pictures, st.integers(-30, 30))
def test_powers_of_two_scale_exactly(g: np.ndarray, power: int) -> None:
    w = adapter(g.shape)
    for ours, plain in zip(three_steps(scaled(g, 2.0**power), w), three_steps(g, w), strict=True):
        # No rounding moves: equal, and not merely close.
        assert np.array_equal(np.asarray(ours), scaled(np.asarray(plain), 2.0**power))


@examples
@given(pictures, st.floats(1e-6, 1e6))
def test_every_factor_scales(g: np.ndarray, factor: float) -> None:
    w = adapter(g.shape)
    for ours, plain in zip(three_steps(scaled(g, factor), w), three_steps(g, w), strict=True):
        expected = np.asarray(plain, np.float64) * float(np.float32(factor))
        # Elements of g are rounded once more; a Laplacian of them has eight times their size at most.
        assert np.abs(np.asarray(ours) - expected).max() <= 3e-6 * np.abs(expected).max(initial=0)


@examples
@given(pictures, st.floats(0, 0.2), st.floats(0, 2))
def test_edges_keep_the_largest_magnitude_and_constants(g: np.ndarray, penalty: float, threshold: float) -> None:
    out = np.asarray(edges(g, penalty, threshold))
    assert np.abs(out).max() <= np.abs(g).max() * (1 + 1e-6)  # the rounding of a weighted mean
    assert out.min() >= g.min() - 1e-6 * np.abs(g).max()
    constant = np.full_like(g, g[0, 0])
    assert np.array_equal(np.asarray(edges(constant, penalty, 0.0)), constant)


@examples
@given(pictures, st.floats(0, 1))
def test_frequencies_multiply_the_energy_above_the_cutoff_and_keep_the_rest(g: np.ndarray, penalty: float) -> None:
    out = np.asarray(frequencies(g, penalty), np.float64)
    high = oracle.above_cutoff(*g.shape)
    before, after = np.fft.rfft2(g.astype(np.float64)), np.fft.rfft2(out)
    # Amplitudes, which say more than energies.  Their error is that of a float32 FFT, relative to the whole.
    tolerance = 1e-6 * np.linalg.norm(before)
    assert np.linalg.norm((after - (1 - penalty) * before)[high]) <= tolerance
    assert np.linalg.norm((after - before)[~high]) <= tolerance
    # Each of rfft2's columns but the first and that of the Nyquist frequency stands for two.
    n1, n2 = g.shape
    k2 = np.arange(n2 // 2 + 1)
    density = np.where((k2 == 0) | (2 * k2 == n2), 1, 2) * np.abs(before) ** 2 / (n1 * n2)
    removed = (1 - (1 - penalty) ** 2) * density[high].sum()
    energy = float(np.sum(g.astype(np.float64) ** 2))
    assert abs(energy - removed - float(np.sum(out**2))) <= 3e-6 * energy


@examples
@given(st.sampled_from(SHAPES), seeds, st.sampled_from(SPECTRA[:2]), st.floats(0.01, 0.9), st.floats(1, 3))
def test_low_rank_turns_with_the_long_side(
    shape: tuple[int, int], seed: int, kind: str, strength: float, emphasis: float
) -> None:
    rng = np.random.default_rng(seed)
    w, g = weight_of(kind, shape, rng).astype(np.float64), rng.standard_normal(shape)
    # A tie: the rows, in flax's layout the last axis, are the short side.
    long = 0 if shape[0] >= shape[1] else 1
    turn = np.linalg.qr(rng.standard_normal((shape[long],) * 2))[0]

    def turned(x: np.ndarray) -> np.ndarray:
        return turn @ x if long == 0 else x @ turn

    def stage(g: np.ndarray, w: np.ndarray) -> np.ndarray:
        return np.asarray(low_rank(g.astype(np.float32), w.astype(np.float32), strength, emphasis), np.float64)

    # Rounding the turned arrays: 6e-8 of w, up to ten times as much of its weakest direction, and the whole of g.
    assert relative(stage(turned(g), turned(w)), turned(stage(g, w))) < 1e-5


@jax.jit
def tail(W: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """F W, its norm as the stage has it, and Ω."""
    with wide_numbers():
        found = directions(gram(W))
        return narrowed(product(found.tail, widened(W))), found.length, found.weak


@examples
@given(st.sampled_from([(3, 3), (4, 7), (16, 40)]), seeds, st.sampled_from(SPECTRA))
def test_the_tail_has_singular_values_between_0_and_1(shape: tuple[int, int], seed: int, kind: str) -> None:
    w = weight_of(kind, shape, np.random.default_rng(seed))
    W = w / np.float32(2.0 ** np.ceil(np.log2(np.abs(w).max())))
    T, length, weak = (np.asarray(x, np.float64) for x in tail(W))
    values = np.linalg.svd(T, compute_uv=False)
    # σ / √(σ² + δ²) times a weight in (0, 1], for every scale of W; F W has the root of the mean eigenvalue beside it.
    assert 0 < values.max() <= np.linalg.norm(W) / shape[0] ** 0.5 * (1 + 1e-6)  # float32 products
    assert length == pytest.approx(np.linalg.norm(values), rel=1e-6)
    weights = np.linalg.eigvalsh(weak)
    assert weights.min() >= -1e-6
    assert weights.max() <= 1 + 1e-6


@examples
@given(pictures, seeds)
def test_strengths_of_nothing_change_nothing(g: np.ndarray, seed: int) -> None:
    assert np.array_equal(np.asarray(edges(g, 0.0, 0.0)), g)
    w = weight_of("full", g.shape, np.random.default_rng(seed))
    assert np.array_equal(np.asarray(low_rank(g, w, 0.0, 1.0)), g)
    # An FFT there and back.
    assert np.abs(np.asarray(frequencies(g, 0.0)) - g).max() <= 1e-6 * np.abs(g).max(initial=0)
