"""The pass over the elements of an array, and what follows from its sums.

`docs/algorithm.md`, section 5.  The pass is elementwise but for its sums, so it can be taken chunk by chunk.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Config, Decay, Slot, StatePlan, decay
from automagic_core.config import constants
from automagic_optax.arrays.means import accurate_sum, ema, number, one_minus_power, quotient, ratio
from automagic_optax.cameamp import equations
from automagic_optax.cameamp.known_before import Known, Shared, squares
from automagic_optax.cameamp.learning_rate import Evidence, count_votes, evidence, signed_sum
from automagic_optax.cameamp.states import ArrayState
from automagic_optax.codec.stored import RowColumn, Statistics, read_nonnegative, read_signed

f32 = np.float32
_SPATIAL: Decay = decay(constants.SPATIAL_DECAY)


class Pass(NamedTuple):
    """What a pass over the elements of an array, or of a chunk of it, finds.

    Attributes:
        update: float32, to be added to the parameter.
        states: the new states of `elementwise_states`.
        rows, columns: sums over the columns and over the rows, by their names.
        totals: sums over all elements.
        spread: of d over the columns; None where the array has no `spatial_variance`.
    """

    update: jax.Array
    states: dict[str, Any]
    rows: dict[str, jax.Array]
    columns: dict[str, jax.Array]
    totals: dict[str, jax.Array]
    spread: equations.Spread | None


def elements(
    g: jax.Array, w: jax.Array, old: dict[str, Any], known: Known, plan: StatePlan, decayed: bool, shared: Shared
) -> Pass:
    """The pass over the elements of an array, or of a chunk of it.

    Args:
        g, w: gradient and parameter, of one shape and any floating dtype.
        old: the `elementwise_states`.
        known: see there; its row and column statistics broadcast against g.
        plan: of the array, or of the chunk.
        decayed: whether weight decay applies.
        shared: what all arrays share.
    """
    config, rates, writer = shared.config, shared.rates, shared.writer
    beta1, beta2, beta3 = map(decay, config.betas)
    g, w = g.astype(jnp.float32), w.astype(jnp.float32)
    t = known.age.astype(jnp.float32)
    states: dict[str, Any] = {}
    rows: dict[str, jax.Array] = {}
    columns: dict[str, jax.Array] = {}
    totals: dict[str, jax.Array] = {}

    # Second moment
    if known.root is None:
        v = ema(beta2, _values(read_nonnegative(old["exp_avg_sq"])), squares(g))
        root = equations.root_second_moment(v, beta2, t)
        states["exp_avg_sq"] = writer.nonnegative(v, old["exp_avg_sq"], Slot.exp_avg_sq)
        if config.background_regularization:
            totals["root"] = accurate_sum(root)
    else:
        root = equations.root_of_factors(known.root)

    # Normalized gradient
    u = jnp.clip(ratio(quotient(g, known.growth), root), -number(config.update_clip), number(config.update_clip))

    # Momentum
    last_m = read_signed(old["exp_avg"])
    m = ema(beta1, last_m, u)
    states["exp_avg"] = writer.signed(m, old["exp_avg"], Slot.exp_avg)
    m_hat = quotient(m, one_minus_power(beta1, t))

    # Confidence.  At an array's first step m̂ is u itself, and float32 would leave noise in the difference.
    e = jnp.where(known.age == 1, f32(0), jnp.square(u - m_hat))
    if known.res is None:
        r = ema(beta3, _values(read_nonnegative(old["exp_avg_res"])), e)
        r_hat = equations.confidence(r, beta3, t)
        states["exp_avg_res"] = writer.nonnegative(r, old["exp_avg_res"], Slot.exp_avg_res)
    else:
        r_hat = equations.confidence_of_factors(known.res, beta3, t)
        if known.res.row is not None:
            rows["e"] = equations.row_sum(e, plan)
        if known.res.column is not None:
            columns["e"] = equations.column_sum(e, plan)
    d = m_hat / jnp.sqrt(r_hat + number(config.confidence_floor))

    # Torque
    if config.torque:
        last_s = read_signed(old["s"]) if "s" in old else None
        d, s = equations.torque(d, u, last_s, decay(config.torque_decay), shared.warming, known.torque_mean)
        totals["s"] = accurate_sum(s)
        if "s" in old:
            states["s"] = writer.signed(s, old["s"], Slot.s)

    spread = equations.row_spread(d, plan) if plan.has_spatial_variance else None

    # Learning rate and weight decay
    delta = known.rows * d
    if plan.has_walk:
        signed_sum(rows, totals, delta, writer.signs(plan.shape), plan)
    decays = not isinstance(shared.weight_decay, (int, float)) or shared.weight_decay != 0
    if decayed and decays:
        b = f32(1) if known.background is None else equations.background(root, known.background)
        delta = delta + rates.array() * jnp.asarray(shared.weight_decay, jnp.float32).reshape(()) * b * w

    # An infinite weight would decay by ∞ or by 0 · ∞ and become NaN; with a finite update it stays infinite.
    delta = jnp.nan_to_num(delta)

    # Votes, which enter the rate of the next step
    if plan.votes:
        count_votes(rows, totals, g, last_m, plan)
    elif plan.has_walk:
        totals["weight"] = accurate_sum(jnp.abs(g))
    return Pass(-delta, states, rows, columns, totals, spread)


def _values(x: jax.Array | Statistics) -> jax.Array:
    assert not isinstance(x, Statistics)
    return x


def held(plan: StatePlan, old: ArrayState, config: Config) -> StatePlan:
    """The plan as the states are: without those that `finish_warmup` dropped, in the form of an earlier version."""
    return dataclasses.replace(
        plan,
        factored_sq=isinstance(old.exp_avg_sq, RowColumn),
        factored_res=isinstance(old.exp_avg_res, RowColumn),
        has_s=config.torque and old.s is not None,
        has_walk=plan.has_walk and old.walk is not None,
        votes=plan.votes and (old.walk is not None or not plan.has_walk),
        has_spatial_variance=old.spatial_variance is not None,
    )


def elementwise_states(old: ArrayState, plan: StatePlan) -> dict[str, Any]:
    """The states that `elements` reads and writes, by their names."""
    here = {
        "exp_avg": True,
        "exp_avg_sq": not plan.factored_sq,
        "exp_avg_res": not plan.factored_res,
        "s": plan.has_s,
    }
    return {name: getattr(old, name) for name, is_here in here.items() if is_here}


def finished(
    found: Pass, old: ArrayState, known: Known, plan: StatePlan, shared: Shared
) -> tuple[ArrayState, Evidence]:
    """The array's new states and its evidence, from the sums over all elements."""
    config, writer = shared.config, shared.writer
    beta3 = decay(config.betas[2])
    states = dict(found.states)
    if known.v is not None:
        states["exp_avg_sq"] = writer.nonnegative(known.v, old.exp_avg_sq, Slot.exp_avg_sq)
    if known.r is not None:
        r = equations.averaged(beta3, known.r, found.rows.get("e"), found.columns.get("e"), plan)
        states["exp_avg_res"] = writer.nonnegative(r, old.exp_avg_res, Slot.exp_avg_res)
    if "root" in found.totals:
        states["background_scale"] = found.totals["root"] / f32(plan.size)
    if "s" in found.totals:
        states["torque_mean"] = (1 + found.totals["s"] / f32(plan.size)) * f32(0.5)
    if found.spread is not None and old.spatial_variance is not None:
        variance = found.spread.squares / f32(plan.columns)
        states["spatial_variance"] = ema(_SPATIAL, old.spatial_variance, variance)
    if old.walk is not None and plan.has_walk:
        along = found.rows["walk"] if "walk" in found.rows else found.totals["walk"].reshape(old.walk.shape)
        states["walk"] = jnp.where(shared.warming, old.walk * shared.keep + along, old.walk)
    new = old._replace(age=known.age, **states)
    return new, evidence(found.rows, found.totals, known.mean_square, old.age > 0, plan)
