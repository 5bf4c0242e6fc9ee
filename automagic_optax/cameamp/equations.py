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
from automagic_optax.arrays.means import accurate_mean, ema, one_minus_power, quotient
from automagic_optax.codec.stored import Statistics

f32 = np.float32


def row_mean(x: jax.Array, plan: StatePlan) -> jax.Array:
    """Mean over the columns: a row statistic."""
    return accurate_mean(x, plan.column_axes)


def column_mean(x: jax.Array, plan: StatePlan) -> jax.Array:
    """Mean over the row axis: a column statistic."""
    assert plan.row_axis is not None, "an array without rows has no column statistic"
    return accurate_mean(x, (plan.row_axis,))


def average_moment(decay: Decay, old: jax.Array | Statistics, x: jax.Array, plan: StatePlan) -> jax.Array | Statistics:
    """The moving average of x, elementwise or of its row and column means, in the form of `old`."""
    if isinstance(old, Statistics):
        row = None if old.row is None else ema(decay, old.row, row_mean(x, plan))
        return Statistics(row, None if old.column is None else ema(decay, old.column, column_mean(x, plan)))
    return ema(decay, old, x)


def root_second_moment(v: jax.Array | Statistics, decay: Decay, age: jax.Array) -> jax.Array:
    """√v̂, with v̂ at least 10⁻³⁰ (section 5.1).

    Row and column statistics: each gets its root before they are multiplied, which takes fewer roots.  R is divided by
    its mean first, since R · C underflows.
    """
    if isinstance(v, Statistics):
        assert v.row is not None
        assert v.column is not None
        row = jnp.sqrt(quotient(quotient(v.row, accurate_mean(v.row)), one_minus_power(decay, age)))
        return jnp.maximum(row * jnp.sqrt(v.column), f32(constants.SQUARE_FLOOR**0.5))
    return jnp.sqrt(jnp.maximum(quotient(v, one_minus_power(decay, age)), f32(constants.SQUARE_FLOOR)))


def growth(
    q: jax.Array, v: jax.Array | Statistics, decay: Decay, age: jax.Array, plan: StatePlan
) -> tuple[jax.Array, jax.Array]:
    """The mean of q over the array, and max(1, k): by how much the gradient exceeds those so far (section 5.1).

    Args:
        q: g² + 10⁻³⁰.
        v: the second moment with this step.
        decay, age: of the second moment.
        plan: says what the rows are.
    """
    if isinstance(v, Statistics):
        assert v.row is not None
        mean_square, mean = accurate_mean(row_mean(q, plan)), accurate_mean(v.row)
    else:
        mean_square, mean = accurate_mean(q), accurate_mean(v)
    # At an array's first step k is 1, but for roundings.
    square = jnp.where(age == 1, f32(1), mean_square / mean * one_minus_power(decay, age))
    return mean_square, jnp.sqrt(jnp.maximum(square, f32(1)))


def confidence(
    r: jax.Array | Statistics, e: jax.Array, decay: Decay, age: jax.Array, plan: StatePlan
) -> tuple[jax.Array, jax.Array | Statistics]:
    """r̂ and the new `exp_avg_res` (section 5.3).

    One pseudo-observation of 1 keeps the first steps from being over-confident.  Row and column statistics, or the one
    of them that a narrow array has, give r̂ from their values before this step, so that one pass over the data is
    enough.
    """
    complement = f32(decay.complement)
    if isinstance(r, Statistics):
        estimate = next(x for x in r if x is not None)
        if r.row is not None and r.column is not None:
            estimate = quotient(r.row, jnp.maximum(accurate_mean(r.row), f32(constants.SQUARE_FLOOR))) * r.column
        r_hat = quotient(estimate + complement, complement + one_minus_power(decay, age - 1))
        return r_hat, average_moment(decay, r, e, plan)
    r = ema(decay, r, e)
    return quotient(r + complement, complement + one_minus_power(decay, age)), r


class Torque(NamedTuple):
    """d after the torque, and the new states."""

    d: jax.Array
    s: jax.Array
    torque_mean: jax.Array


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
    return Torque(d, s, (1 + accurate_mean(s)) * f32(0.5))


def spatial_factor(spatial_variance: jax.Array) -> jax.Array:
    """κ from the row variances before this step (section 5.5); 1 where their mean is 0, and so at the first step."""
    mean = accurate_mean(spatial_variance)
    low, high = constants.SPATIAL_LIMITS
    # For derivatives κ is a constant where it is at its limit, and where the variances are rounding errors.
    steep = (spatial_variance * f32(16) < mean) | (mean < f32(1e-14))
    mean, spatial_variance = jax.tree.map(
        lambda x: jnp.where(steep, jax.lax.stop_gradient(x), x), (mean, spatial_variance)
    )
    ratio = jnp.sqrt(jnp.where(mean == 0, f32(1), mean) / jnp.maximum(spatial_variance, f32(constants.SPATIAL_FLOOR)))
    return jnp.where(mean == 0, f32(1), jnp.clip(ratio, f32(low), f32(high)))


def row_variance(d: jax.Array, plan: StatePlan) -> jax.Array:
    """Population variance over the columns: a row statistic."""
    return row_mean(jnp.square(d - row_mean(d, plan)), plan)


def background(
    v: jax.Array | Statistics, root: jax.Array, background_scale: jax.Array | None, decay: Decay, age: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """b = 2 / (1 + exp(4z)) with z = √v̂ / mean(√v̂) − 1, and the new `background_scale` (section 5.7).

    Args:
        v: `exp_avg_sq` after this step.
        root: √v̂.
        background_scale: the mean of √v̂ at the array's previous step, 0 before the first.  Where v is row and column
            statistics, it stays as it is: they give the mean of this step.
    """
    if isinstance(v, Statistics):
        assert v.row is not None
        assert v.column is not None
        mean = accurate_mean(jnp.sqrt(v.row)) * accurate_mean(jnp.sqrt(v.column)) / jnp.sqrt(accurate_mean(v.row))
        mean, new_scale = mean / jnp.sqrt(one_minus_power(decay, age)), background_scale
    else:
        assert background_scale is not None, "only factored second moments do without"
        mean, new_scale = background_scale, accurate_mean(root)
    z = quotient(root, jnp.where(mean > 0, mean, f32(1))) - 1
    # An infinite exponential would give b = 0 and no derivative.
    b = f32(2) / (1 + jnp.exp(jnp.minimum(f32(constants.BACKGROUND_SLOPE) * z, f32(80))))
    return jnp.where(mean > 0, b, f32(1)), new_scale
