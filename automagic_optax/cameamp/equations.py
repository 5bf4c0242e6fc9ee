"""Section 5 on float32 arrays: pure functions of one array's gradient and states, in the order of the page.

States come in as they read (float32, or row and column statistics) and go out as they are before being stored, so
nothing here knows of codes.  Statistics keep their dimensions and broadcast against the array.

Shapes: "array" is the parameter's shape; "row" is 1 everywhere but on the row axis; "column" is 1 on the row axis.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Decay, StatePlan
from automagic_core.config import constants
from automagic_optax.arrays.averages import average, remainder
from automagic_optax.arrays.means import accurate_mean, quotient
from automagic_optax.codec.stored import RowColumn

Array = jax.Array
f32 = np.float32


def row_mean(x: Array, plan: StatePlan) -> Array:
    """Mean over the columns: a row statistic."""
    return accurate_mean(x, plan.column_axes)


def column_mean(x: Array, plan: StatePlan) -> Array:
    """Mean over the row axis: a column statistic."""
    assert plan.row_axis is not None, "an array without rows has no column statistic"
    return accurate_mean(x, (plan.row_axis,))


def average_moment(decay: Decay, old: Array | RowColumn, x: Array, plan: StatePlan) -> Array | RowColumn:
    """The moving average of x, elementwise or of its row and column means, as `old` is kept."""
    if isinstance(old, RowColumn):
        row = average(decay, old.row, row_mean(x, plan))
        return RowColumn(row, average(decay, old.column, column_mean(x, plan)))
    return average(decay, old, x)


def root_second_moment(v: Array | RowColumn, decay: Decay, age: Array) -> Array:
    """√v̂, with v̂ at least 10⁻³⁰.

    Of row and column statistics the roots are taken first, a few instead of one per element; R is divided by its mean
    before it meets C, since the product R · C underflows.
    """
    if isinstance(v, RowColumn):
        row = jnp.sqrt(quotient(quotient(v.row, accurate_mean(v.row)), remainder(decay, age)))
        return jnp.maximum(row * jnp.sqrt(v.column), f32(constants.SQUARE_FLOOR**0.5))
    return jnp.sqrt(jnp.maximum(quotient(v, remainder(decay, age)), f32(constants.SQUARE_FLOOR)))


def confidence(
    r: Array | RowColumn, e: Array, decay: Decay, age: Array, plan: StatePlan
) -> tuple[Array, Array | RowColumn]:
    """r̂ and the new `exp_avg_res`; one pseudo-observation of 1 keeps the first steps from being over-confident.

    Row and column statistics are read as they were before this step, so that one pass over the data is enough.
    """
    complement = f32(decay.complement)
    if isinstance(r, RowColumn):
        estimate = quotient(r.row, jnp.maximum(accurate_mean(r.row), f32(constants.SQUARE_FLOOR))) * r.column
        r_hat = quotient(estimate + complement, complement + remainder(decay, age - 1))
        return r_hat, average_moment(decay, r, e, plan)
    r = average(decay, r, e)
    return quotient(r + complement, complement + remainder(decay, age)), r


class Torque(NamedTuple):
    """d after the torque and the states it leaves."""

    d: Array
    s: Array
    torque_mean: Array


def torque(d: Array, u: Array, s: Array | None, decay: Decay, warming: Array, torque_mean: Array) -> Torque:
    """d · τ / τ̄ with τ = (1 + s) / 2: elements whose momentum and gradient agree keep their step.

    Args:
        d, u: step and normalized gradient.
        s: the smoothed agreement, or None where none is kept.
        decay: γ.
        warming: boolean scalar; afterwards s is this step's agreement.
        torque_mean: τ̄, the mean of τ at the array's previous step.
    """
    x = d * u
    a = x / (jnp.abs(x) + f32(constants.TORQUE_SOFTNESS))
    s = a if s is None else jnp.where(warming, average(decay, s, a), a)
    tau = (1 + s) * f32(0.5)
    d = quotient(d * tau, jnp.maximum(torque_mean, f32(constants.TORQUE_MEAN_FLOOR)))
    return Torque(d, s, (1 + accurate_mean(s)) * f32(0.5))


def spatial_factor(spatial_variance: Array) -> Array:
    """κ from the row variances of the array's previous step; 1 where their mean is 0, so at its first step."""
    mean = accurate_mean(spatial_variance)
    ratio = jnp.sqrt(mean / jnp.maximum(spatial_variance, f32(constants.SPATIAL_FLOOR)))
    low, high = constants.SPATIAL_LIMITS
    return jnp.where(mean == 0, f32(1), jnp.clip(ratio, f32(low), f32(high)))


def row_variance(d: Array, plan: StatePlan) -> Array:
    """Population variance over the columns: a row statistic."""
    return row_mean(jnp.square(d - row_mean(d, plan)), plan)


def background(
    v: Array | RowColumn, root: Array, background_scale: Array | None, decay: Decay, age: Array
) -> tuple[Array, Array | None]:
    """b = 2 / (1 + exp(4z)) with z = √v̂ / mean(√v̂) − 1, and the new `background_scale`.

    Args:
        v: `exp_avg_sq` after this step.
        root: √v̂.
        background_scale: mean of √v̂ at the array's previous step, 0 before the first.  Row and column statistics
            give the mean of this step, and leave it as it is.
    """
    if isinstance(v, RowColumn):
        mean = accurate_mean(jnp.sqrt(v.row)) * accurate_mean(jnp.sqrt(v.column)) / jnp.sqrt(accurate_mean(v.row))
        mean, new_scale = mean / jnp.sqrt(remainder(decay, age)), background_scale
    else:
        assert background_scale is not None, "only factored second moments do without"
        mean, new_scale = background_scale, accurate_mean(root)
    z = quotient(root, jnp.where(mean > 0, mean, f32(1))) - 1
    b = f32(2) / (1 + jnp.exp(f32(constants.BACKGROUND_SLOPE) * z))
    return jnp.where(mean > 0, b, f32(1)), new_scale
