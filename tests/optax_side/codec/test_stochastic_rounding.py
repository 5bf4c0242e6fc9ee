"""Stochastic rounding of section 3: the oracle's codes bit for bit, unbiased, and what it is good for."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from automagic_optax import QuantizedArray, quantize, random_unit
from tests.optax_side.codec_samples import assert_stored, borders, random_values, with_unit_absmax
from tests.oracle import codec as oracle


def stochastic(
    x: jax.Array, step: jax.Array | int, *, signed: bool, block_size: int | None, slot: int
) -> QuantizedArray:
    return quantize(x, signed=signed, block_size=block_size, random=random_unit(step, slot, x.shape))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("block_size", [256, None])
def test_codes_of_a_million_values_are_the_oracles(signed: bool, block_size: int | None) -> None:
    shape = (1000, 1003)
    slot = 0 if signed else 1
    run = jax.jit(partial(stochastic, signed=signed, block_size=block_size, slot=slot))
    x = random_values(1_003_000, signed, seed=11).reshape(shape)
    for step in (1, 2**31 - 1):
        codes, absmax = oracle.quantize_stochastic(x, signed, block_size, step, slot)
        assert_stored(run(x, jnp.int32(step)), codes, absmax)
    nearest = oracle.quantize(x, signed, block_size)[0]
    assert (codes != nearest).mean() > 0.1  # so it was not rounding to nearest that was compared
    if block_size == 256:  # and operation by operation
        eager = stochastic(jnp.asarray(x), 2**31 - 1, signed=signed, block_size=block_size, slot=slot)
        assert_stored(eager, codes, absmax)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("jit", [False, True])
def test_hard_values_are_the_oracles(signed: bool, jit: bool) -> None:
    run = partial(stochastic, signed=signed, block_size=256, slot=3)
    run = jax.jit(run) if jit else run
    for step in range(1, 6):
        for scale in (1.0, 0.7, 2.0**-100):
            x = with_unit_absmax(borders(signed), 256) * np.float32(scale)
            x[np.abs(x) < 2.0**-126] = 0  # XLA reads subnormals as zeros on a CPU
            codes, absmax = oracle.quantize_stochastic(x, signed, 256, step, 3)
            assert_stored(run(x, step), codes, absmax)


@pytest.mark.parametrize("signed", [True, False])
def test_a_codebook_value_stays_what_it_is(signed: bool) -> None:
    x = np.tile(oracle.codebook(signed), 16)
    run = jax.jit(partial(stochastic, signed=signed, block_size=256, slot=0))
    for step in range(1, 20):
        codes = np.asarray(run(x, step).codes)
        assert np.array_equal(codes, np.tile(np.arange(256), 16))


@pytest.mark.parametrize("signed", [True, False])
def test_unbiased(signed: bool) -> None:
    draws = 4096
    # A thousand points of the map, which in the signed one ends at −0.993; the last element holds the scale.
    points = np.linspace(-0.9929 if signed else 0, 1, 1000).astype(np.float32)
    x = np.append(points, np.float32(1))

    def mean_of_draws(x: jax.Array) -> jax.Array:
        def draw(step: jax.Array) -> jax.Array:
            values = stochastic(x, step, signed=signed, block_size=None, slot=0).dequantize()
            return values - x  # small, so that the float32 mean loses nothing

        return jax.lax.map(draw, jnp.arange(1, draws + 1), batch_size=256).mean(axis=0)

    bias = np.asarray(jax.jit(mean_of_draws)(x))[:-1]
    book, exact = oracle.codebook(signed).astype(np.float64), points.astype(np.float64)
    above = np.clip(np.searchsorted(book, exact), 1, 255)
    variance = (exact - book[above - 1]) * (book[above] - exact)  # of a draw between two neighbours
    # Five standard errors: one false alarm in 1,700 for a thousand points.  In addition the grain of r, 2⁻²⁴ of a gap
    # (gaps are at most 0.0141), and float32's error in values of up to 1.
    allowed = 5 * np.sqrt(variance / draws) + 2.0**-24
    assert np.all(np.abs(bias) <= allowed), np.abs(bias / allowed).max()
    # The same points rounded to nearest are biased beyond what is allowed: the test can fail.
    nearest = np.asarray(quantize(x, signed=signed, block_size=None).dequantize())[:-1] - points
    assert (np.abs(nearest) > allowed).mean() > 0.8


def test_below_the_signed_maps_end_everything_is_its_end() -> None:
    x = jnp.asarray([-1.0, -0.9999, -0.994, 1.0])
    run = jax.jit(partial(stochastic, signed=True, block_size=256, slot=0))
    for step in range(1, 50):
        codes = np.asarray(run(x, step).codes)
        assert codes.tolist() == [0, 0, 0, 255]


@pytest.mark.parametrize(
    ("rounding", "companded", "page"),
    [
        ("stochastic", True, 0.136),
        pytest.param("nearest", True, 0.85, marks=pytest.mark.slow),
        pytest.param("nearest", False, 0.36, marks=pytest.mark.slow),
    ],
)
def test_an_average_with_beta_0999_stalls_unless_rounded_stochastically(
    rounding: str, companded: bool, page: float
) -> None:
    # The experiment of section 3: a second moment moving from 1 to 0.09 in 3,000 steps.
    n, beta = 4096, np.float32(0.999)

    def store(v: jax.Array, step: jax.Array) -> QuantizedArray:
        random = random_unit(step, 1, v.shape) if rounding == "stochastic" else None
        return quantize(jnp.sqrt(v) if companded else v, signed=False, random=random)

    def read(stored: QuantizedArray) -> jax.Array:
        value = stored.dequantize()
        return jnp.square(value) if companded else value

    def step(carry: tuple, t: jax.Array) -> tuple[tuple, None]:
        stored, exact = carry
        g = 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (n,))
        stored = store(beta * read(stored) + (1 - beta) * g**2, t)
        return (stored, beta * exact + (1 - beta) * g**2), None

    first = jnp.ones(n)
    run = jax.jit(lambda: jax.lax.scan(step, (store(first, jnp.int32(1)), first), jnp.arange(1, 3001))[0])
    stored, exact = run()
    mean, truth = float(read(stored).mean()), float(exact.mean())
    assert truth == pytest.approx(0.135, abs=5e-4)  # the page's digits; 0.09 + 0.91 · 0.999³⁰⁰⁰
    if rounding == "stochastic":
        assert abs(mean / truth - 1) < 0.02
    else:
        assert mean / truth > 2  # stalled
    # Two digits on the page, and other random gradients there: a twentieth.
    assert mean == pytest.approx(page, rel=0.05)
