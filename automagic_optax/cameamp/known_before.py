"""What must be known of an array before the pass over its elements (`docs/algorithm.md`, section 5)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import MAX_STEP, Config, StatePlan, decay
from automagic_core.config import constants
from automagic_optax.arrays.means import accurate_sum, ema
from automagic_optax.cameamp import equations
from automagic_optax.cameamp.learning_rate import Rates
from automagic_optax.cameamp.states import ArrayState
from automagic_optax.codec.stored import Statistics, Writer, read_nonnegative

f32 = np.float32


class Shared(NamedTuple):
    """What all arrays share in one step.

    Attributes:
        config: the hyperparameters.
        weight_decay: a number or a traced scalar.
        warming: boolean scalar, t ≤ `warmup_steps`.
        rates: the learning rates.
        keep: what is kept of every walk, 0 or 1.
        writer: stores the states.
        gradient_limit: an array with a gradient element above this in magnitude is skipped.
    """

    config: Config
    weight_decay: Any
    warming: jax.Array
    rates: Rates
    keep: jax.Array
    writer: Writer
    gradient_limit: float | jax.Array


class Known(NamedTuple):
    """What is known of an array before the pass over its elements.

    Attributes:
        age: int32 scalar, with this step included.
        v: row and column averages of q after this step; None where `exp_avg_sq` has single values.
        root: row and column factors of √v̂; None likewise.
        growth: max(1, k), by how much the gradient exceeds those so far.
        mean_square: the mean of q.
        r: row and column averages of e before this step; None where `exp_avg_res` has single values.
        res: row and column factors of r; None likewise.
        rows: ηᵢ, a row statistic or a scalar.
        torque_mean, background: scalars, those that this step uses; `background` is None where b is 1.
    """

    age: jax.Array
    v: Statistics | None
    root: Statistics | None
    growth: jax.Array
    mean_square: jax.Array
    r: Statistics | None
    res: Statistics | None
    rows: jax.Array
    torque_mean: jax.Array
    background: jax.Array | None


class Looked(NamedTuple):
    """What a first pass over the elements of an array, or of a chunk of it, finds.

    Attributes:
        row, column: sums of q over columns and rows; None where `exp_avg_sq` has single values.
        square, v: there the sum of q and that of `exp_avg_sq` before this step; else None.
    """

    row: jax.Array | None
    column: jax.Array | None
    square: jax.Array | None
    v: jax.Array | None


def look(g: jax.Array, old: dict[str, Any], plan: StatePlan) -> Looked:
    """The first pass: what the update must know of the whole array.

    Args:
        g: the gradient.
        old: the `elementwise_states`.
        plan: of the array, or of the chunk.
    """
    q = squares(g.astype(jnp.float32))
    if plan.factored_sq:
        return Looked(equations.row_sum(q, plan), equations.column_sum(q, plan), None, None)
    before = read_nonnegative(old["exp_avg_sq"])
    assert not isinstance(before, Statistics)
    return Looked(None, None, accurate_sum(q), accurate_sum(before))


@jax.custom_jvp
def constant_at_zero(g: jax.Array, before: Any) -> jax.Array:
    """g; a constant for derivatives where it and all gradients before it are 0: there u jumps from −1 to 1.

    Args:
        g: the gradient.
        before: `exp_avg_sq` before this step.
    """
    return g


@constant_at_zero.defjvp
def _of_constant_at_zero(primals: Any, tangents: Any) -> Any:
    g, before = primals
    known = [jnp.max(x, initial=0) for x in jax.tree.leaves(read_nonnegative(before))]
    still = ~jnp.any(g) & (jnp.stack(known) < f32(2 * constants.SQUARE_FLOOR)).all()
    return g, jnp.where(still, 0, tangents[0])


def squares(g: jax.Array) -> jax.Array:
    """q = g² + 10⁻³⁰."""
    return jnp.square(g) + f32(constants.SQUARE_FLOOR)


def known(old: ArrayState, seen: Looked, plan: StatePlan, shared: Shared) -> Known:
    """What is known before the second pass.

    Args:
        old: the array's states.
        seen: what the first one found in the whole array.
        plan: says in which form the states are.
        shared: what all arrays share.
    """
    config = shared.config
    _, beta2, _ = map(decay, config.betas)
    age = jnp.minimum(old.age, MAX_STEP - 1) + 1
    t = age.astype(jnp.float32)
    v, root, r, res, background = None, None, None, None, old.background_scale
    if plan.factored_sq:
        before = read_nonnegative(old.exp_avg_sq)
        assert isinstance(before, Statistics)
        assert seen.row is not None
        v = equations.averaged(beta2, before, seen.row, seen.column, plan)
        assert v.row is not None
        mean_square, mean = accurate_sum(seen.row) / f32(plan.size), equations.mean_of_rows(v.row)
        root = equations.root_factors(v, beta2, t)
        background = equations.mean_root(v, beta2, t) if config.background_regularization else None
    else:
        assert seen.square is not None
        assert seen.v is not None
        mean_square, before_mean = seen.square / f32(plan.size), seen.v / f32(plan.size)
        mean = ema(beta2, before_mean, mean_square)
    if plan.factored_res:
        found = read_nonnegative(old.exp_avg_res)
        assert isinstance(found, Statistics)
        r, res = found, equations.confidence_factors(found)
    kappa = None if old.spatial_variance is None else equations.spatial_factor(old.spatial_variance)
    rows = shared.rates.rows(old.lr_mask, kappa)
    background = background if config.background_regularization else None
    growth = equations.growth(mean_square, mean, beta2, t)
    return Known(age, v, root, growth, mean_square, r, res, rows, old.torque_mean, background)
