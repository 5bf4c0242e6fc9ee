"""Low-precision parameters (section 5): `round_stochastically` is the oracle's, and the update is exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_optax import (
    RoundToParametersState,
    automagic_8bit,
    random_unit,
    round_stochastically,
    round_to_parameters,
)
from tests.oracle import codec as oracle

HALVES = ["bfloat16", "float16"]


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint16)


def samples(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(12)
    x = rng.standard_normal(200_000).astype(np.float32)
    x *= np.exp2(rng.integers(-30, 20, x.size)).astype(np.float32)
    every = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype)).astype(np.float32)
    every = every[np.isfinite(every)]
    largest = np.float32(jnp.finfo(dtype).max)
    edges = [0.0, -0.0, largest, -largest, 65519.0, 65520.0, 65536.0, 3e38, -3e38, np.finfo(np.float32).max, 1.0]
    x = np.concatenate([x, every, np.nextafter(every, np.float32(np.inf)), np.array(edges, np.float32)])
    # XLA flushes float32 subnormals to zero on a CPU, and between bfloat16 neighbours below 2⁻¹¹⁸ the differences are
    # subnormal.  (float16's own subnormals, from 2⁻²⁴, are normal float32 numbers.)
    return x[np.isfinite(x) & ((np.abs(x) >= 2.0**-118) | (x == 0))]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("jit", [False, True])
def test_equals_the_oracle_bit_for_bit(dtype: str, jit: bool) -> None:
    x = samples(dtype)

    def run(x: jax.Array, step: jax.Array) -> jax.Array:
        return round_stochastically(x, jnp.dtype(dtype), random_unit(step, 4, x.shape))

    run = jax.jit(run) if jit else run
    for step in (1, 2, 2**31 - 1):
        ours = run(jnp.asarray(x), jnp.int32(step))
        assert ours.dtype == dtype
        theirs = oracle.round_stochastic_to(x, dtype, step)
        different = np.flatnonzero(bits(ours) != bits(theirs))
        assert different.size == 0, x[different][:5]
        assert np.all(np.isfinite(np.asarray(ours, np.float32)))
    with np.errstate(over="ignore"):
        exact = x.astype(jnp.dtype(dtype)).astype(np.float32) == x
    assert 0.1 < exact.mean() < 0.9
    assert np.array_equal(np.asarray(ours, np.float32)[exact], x[exact])


@pytest.mark.parametrize("dtype", HALVES)
def test_unbiased(dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(13).standard_normal(500), jnp.float32)

    @jax.jit
    def draws(x: jax.Array) -> jax.Array:
        steps = jnp.arange(1, 4097)
        return jax.vmap(lambda t: round_stochastically(x, dtype, random_unit(t, 4, x.shape)).astype(jnp.float32))(steps)

    rounded, exact = np.asarray(draws(x), np.float64), np.asarray(x, np.float64)
    nearest = np.asarray(x.astype(dtype), np.float64)
    low, high = rounded.min(axis=0), rounded.max(axis=0)
    between = (low < exact) & (exact < high)
    assert between.mean() > 0.95  # nearly all were seen on either side
    variance = np.where(between, (exact - low) * (high - exact), 0)  # of a draw between two neighbours
    # Five standard errors, and r's grain of 2⁻²⁴ of a gap, which is at most 2⁻⁷ of values below 4; a point seen on
    # one side only lies within a few 1/4096 of the gap from it.
    gap = np.abs(exact) * float(jnp.finfo(dtype).eps)
    allowed = 5 * np.sqrt(variance / 4096) + 4 * 2.0**-31 + np.where(between, 0, gap * 5 / 4096)
    assert np.all(np.abs(rounded.mean(axis=0) - exact) <= allowed)
    assert (np.abs(nearest - exact) > allowed).mean() > 0.8


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stochastic", [True, False])
def test_the_update_is_the_exact_difference(dtype: str, stochastic: bool) -> None:
    rng = np.random.default_rng(14)
    w = jnp.asarray(rng.standard_normal((300, 70)) * 0.02, dtype)
    u = jnp.asarray(rng.standard_normal((300, 70)) * 1e-5, jnp.float32)
    tx = round_to_parameters(stochastic)
    state = tx.init({"w": w})
    assert isinstance(state, RoundToParametersState)
    moved = 0
    for step in (1, 2, 3):
        updates, state = jax.jit(tx.update)({"w": u}, state, {"w": w})
        assert int(state.step) == step
        assert updates["w"].dtype == jnp.float32
        target = np.asarray(w, np.float32) + np.asarray(u)
        nearest = target.astype(jnp.dtype(dtype))
        expected = oracle.round_stochastic_to(target, dtype, step) if stochastic else nearest
        new = optax.apply_updates({"w": w}, updates)["w"]
        assert new.dtype == dtype
        assert np.array_equal(bits(new), bits(expected))
        # Exact: the float32 sum needs no rounding at all.
        total = np.asarray(w, np.float64) + np.asarray(updates["w"], np.float64)
        assert np.array_equal(total, np.asarray(new, np.float64))
        moved += int((bits(new) != bits(w)).sum())
        w = new
    share = moved / (3 * w.size)
    if dtype == "bfloat16":  # nearest loses most updates this small; the page: 85 % at weights of 0.02
        assert share > 0.1 if stochastic else share < 0.2


@pytest.mark.parametrize("dtype", HALVES)
def test_an_update_of_zero_keeps_every_bit(dtype: str) -> None:
    w = jnp.asarray([0.0, -0.0, 1.5, -(2.0**-20)], dtype)
    tx = round_to_parameters()
    for zero in (0.0, -0.0):
        updates, _ = tx.update(jnp.full(4, zero), tx.init(w), w)
        assert np.array_equal(bits(optax.apply_updates(w, updates)), bits(w))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wide_parameters_get_the_update_in_their_dtype(dtype: str) -> None:
    with jax.enable_x64(True):
        w, u = jnp.ones(5, dtype), jnp.full(5, 1e-9, jnp.float32)
        tx = round_to_parameters()
        updates, _ = tx.update(u, tx.init(w), w)
        assert updates.dtype == dtype
        assert np.array_equal(np.asarray(updates), np.asarray(u).astype(dtype))


@pytest.mark.filterwarnings("error")
def test_float64_parameters_of_numpy_are_float32_without_a_warning() -> None:
    weights = {"kernel": np.ones((3, 4))}
    for tx in (round_to_parameters(), automagic_8bit(1e-4, warmup_steps=0)):
        updates, _ = tx.update({"kernel": np.ones((3, 4), np.float32)}, tx.init(weights), weights)
        assert updates["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_every_nan_stays_one(dtype: str) -> None:
    x = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000], np.uint32).view(np.float32)
    rounded = round_stochastically(jnp.asarray(x), jnp.dtype(dtype), jnp.zeros(4))
    assert np.isnan(np.asarray(rounded, np.float32)).all()
