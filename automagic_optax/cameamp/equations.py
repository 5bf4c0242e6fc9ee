"""The formulas of the update, as pure functions of one array (`docs/algorithm.md`, section 5).

States are float32 arrays, or row and column statistics, which broadcast against the array.  Nothing here knows of
codes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Decay, StatePlan
from automagic_core.config import constants
from automagic_optax.arrays.means import accurate_mean, accurate_sum, ema, one_minus_power, quotient, ratio, square_root
from automagic_optax.codec.stored import Statistics

f32 = np.float32


def row_sum(x: jax.Array, plan: StatePlan) -> jax.Array:
    """Sum over the columns: a row statistic."""
    return accurate_sum(x, plan.column_axes)


def column_sum(x: jax.Array, plan: StatePlan) -> jax.Array:
    """Sum over the row axis: a column statistic."""
    assert plan.row_axis is not None, "an array without rows has no column statistic"
    return accurate_sum(x, (plan.row_axis,))


def averaged(
    decay: Decay, old: Statistics, row: jax.Array | None, column: jax.Array | None, plan: StatePlan
) -> Statistics:
    """The moving averages of row and column means, from the sums of rows and columns that are there."""
    return Statistics(
        None if row is None or old.row is None else ema(decay, old.row, row / f32(plan.columns)),
        None if column is None or old.column is None else ema(decay, old.column, column / f32(plan.row_count)),
    )


def root_factors(v: Statistics, decay: Decay, age: jax.Array) -> Statistics:
    """Row and column statistics whose product is √v̂ (section 5.1).

    Each gets its root before they are multiplied, which takes fewer roots.  R is divided by its mean first, since R · C
    underflows.
    """
    assert v.row is not None
    assert v.column is not None
    # A row of zeros beside large gradients underflows to 0.
    row = square_root(quotient(quotient(v.row, mean_of_rows(v.row)), one_minus_power(decay, age)))
    return Statistics(row, jnp.sqrt(v.column))


def mean_of_rows(R: jax.Array) -> jax.Array:
    """The mean of R, not 0: it begins below the normal numbers of float32 where β₂ is at least 1 − 10⁻⁸."""
    return jnp.maximum(accurate_mean(R), f32(np.finfo(np.float32).tiny))


def root_of_factors(factors: Statistics) -> jax.Array:
    """√v̂, with v̂ at least 10⁻³⁰."""
    assert factors.row is not None
    assert factors.column is not None
    return jnp.maximum(factors.row * factors.column, f32(constants.SQUARE_FLOOR**0.5))


def root_second_moment(v: jax.Array, decay: Decay, age: jax.Array) -> jax.Array:
    """√v̂ of single values, with v̂ at least 10⁻³⁰ (section 5.1)."""
    return jnp.sqrt(jnp.maximum(quotient(v, one_minus_power(decay, age)), f32(constants.SQUARE_FLOOR)))


def growth(mean_square: jax.Array, mean: jax.Array, decay: Decay, age: jax.Array) -> jax.Array:
    """max(1, k): by how much the gradient exceeds those so far (section 5.1).

    Args:
        mean_square: the mean of q = g² + 10⁻³⁰ over the array.
        mean: that of the second moment with this step.
        decay, age: of the second moment.
    """
    # At an array's first step k is 1, but for roundings.
    square = jnp.where(age == 1, f32(1), ratio(mean_square, mean) * one_minus_power(decay, age))
    return jnp.sqrt(jnp.maximum(square, f32(1)))


def confidence_factors(r: Statistics) -> Statistics:
    """R divided by its mean, and C: their product is r from the averages before this step (section 5.3).

    A narrow array has only one of them.
    """
    if r.row is None or r.column is None:
        return r
    return Statistics(quotient(r.row, jnp.maximum(accurate_mean(r.row), f32(constants.SQUARE_FLOOR))), r.column)


def confidence_of_factors(factors: Statistics, decay: Decay, age: jax.Array) -> jax.Array:
    """r̂ from the averages before this step, so that one pass over the data is enough."""
    complement = f32(decay.complement)
    known = [x for x in factors if x is not None]
    estimate = known[0] if len(known) == 1 else known[0] * known[1]
    return quotient(estimate + complement, complement + one_minus_power(decay, age - 1))


def confidence(r: jax.Array, decay: Decay, age: jax.Array) -> jax.Array:
    """r̂ from single values after this step (section 5.3).

    One pseudo-observation of 1 keeps the first steps from being over-confident.
    """
    complement = f32(decay.complement)
    return quotient(r + complement, complement + one_minus_power(decay, age))


class Torque(NamedTuple):
    """d after the torque, and the new s."""

    d: jax.Array
    s: jax.Array


def torque(
    d: jax.Array, u: jax.Array, s: jax.Array | None, decay: Decay, warming: jax.Array, torque_mean: jax.Array
) -> Torque:
    """Scales d up where momentum and gradient agree: d · τ / τ̄ with τ = (1 + s) / 2 (section 5.4).

    Args:
        d, u: step and normalized gradient.
        s: the moving average of the agreement; None where the array has no such state.
        decay: γ.
        warming: boolean scalar; after the warm-up s is the agreement of this step alone.
        torque_mean: τ̄, the mean of τ at the array's previous step.
    """
    x = d * u
    a = x / (jnp.abs(x) + f32(constants.TORQUE_SOFTNESS))
    s = a if s is None else jnp.where(warming, ema(decay, s, a), a)
    tau = (1 + s) * f32(0.5)
    d = quotient(d * tau, jnp.maximum(torque_mean, f32(constants.TORQUE_MEAN_FLOOR)))
    return Torque(d, s)


def spatial_factor(spatial_variance: jax.Array) -> jax.Array:
    """κ from the row variances before this step (section 5.5); 1 where they are rounding, or 0 as at the first step."""
    mean = accurate_mean(spatial_variance)
    low, high = constants.SPATIAL_LIMITS
    noise = mean <= f32(constants.SPATIAL_NOISE)
    # For derivatives κ is a constant where it is at its limit, and where the variances are rounding errors.
    steep = (spatial_variance * f32(16) < mean) | noise
    mean, spatial_variance = jax.tree.map(
        lambda x: jnp.where(steep, jax.lax.stop_gradient(x), x), (mean, spatial_variance)
    )
    ratio = jnp.sqrt(jnp.where(noise, f32(1), mean) / jnp.maximum(spatial_variance, f32(constants.SPATIAL_FLOOR)))
    return jnp.where(noise, f32(1), jnp.clip(ratio, f32(low), f32(high)))


class Spread(NamedTuple):
    """Row statistics: the mean over the columns, and the sum of squared differences from it."""

    mean: jax.Array
    squares: jax.Array


def row_spread(d: jax.Array, plan: StatePlan) -> Spread:
    """The spread over the columns; its squares divided by the number of columns are the population variance."""
    mean = row_sum(d, plan) / f32(plan.columns)
    return Spread(mean, row_sum(jnp.square(d - mean), plan))


def joined(one: Spread, many: jax.Array, other: Spread, few: int) -> Spread:
    """The spread over the columns of two parts, which have `many` and `few` columns (Chan, Golub and LeVeque 1979)."""
    share = f32(few) / (many + f32(few))
    apart = other.mean - one.mean
    return Spread(one.mean + apart * share, one.squares + other.squares + jnp.square(apart) * (many * share))


def mean_root(v: Statistics, decay: Decay, age: jax.Array) -> jax.Array:
    """The mean of √v̂, from the row and column statistics of v (section 5.7)."""
    assert v.row is not None
    assert v.column is not None
    mean = accurate_mean(jnp.sqrt(v.row)) * accurate_mean(jnp.sqrt(v.column))
    return ratio(mean, jnp.sqrt(mean_of_rows(v.row))) / jnp.sqrt(one_minus_power(decay, age))


def background(root: jax.Array, mean: jax.Array) -> jax.Array:
    """b = 2 / (1 + exp(4z)) with z = √v̂ / mean(√v̂) − 1 (section 5.7).

    Args:
        root: √v̂.
        mean: its mean, of this step or the one before; b is 1 where it is 0.
    """
    z = quotient(root, jnp.where(mean > 0, mean, f32(1))) - 1
    # An infinite exponential would give b = 0 and no derivative.
    b = f32(2) / (1 + jnp.exp(jnp.minimum(f32(constants.BACKGROUND_SLOPE) * z, f32(80))))
    return jnp.where(mean > 0, b, f32(1))
