"""The update of one array, or of one batch (`docs/algorithm.md`, section 5)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import MAX_STEP, Config, Decay, Slot, StatePlan, decay
from automagic_core.config import constants
from automagic_optax.arrays.means import ema, one_minus_power, quotient
from automagic_optax.arrays.usable import is_usable
from automagic_optax.cameamp import equations
from automagic_optax.cameamp.learning_rate import Evidence, Rates, count_array, evidence, new_walk
from automagic_optax.cameamp.states import ArrayState
from automagic_optax.codec.polarity import pack_bits, unpack_bits
from automagic_optax.codec.stored import Writer, read_nonnegative, read_signed
from automagic_optax.sharding.placement import devices_of

f32 = np.float32
_SPATIAL: Decay = decay(constants.SPATIAL_DECAY)


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
    gradient_limit: float


class ArrayStep(NamedTuple):
    """The result of the step of one array, or of a batch with a leading axis.

    Attributes:
        update: float32, to be added to the parameter.
        state: the array's new states.
        evidence: what the array says to the search.
        skipped: int32, how many arrays were skipped so far in this call.
    """

    update: jax.Array
    state: ArrayState
    evidence: Evidence
    skipped: jax.Array


def step_array(
    g: jax.Array, w: jax.Array, old: ArrayState, plan: StatePlan, decayed: bool, shared: Shared, skipped: jax.Array
) -> ArrayStep:
    """The step of one array; if its gradient is unusable, the array is skipped (section 6.2).

    A skipped array keeps its states, except that `skipped_steps` grows by one.  Its update is −0.0, which leaves even a
    parameter of −0.0 as it is.  Each array gets the count of skipped arrays from the one before.  So on a CPU each
    waits for the one before, and only one array's float32 values are in memory at a time.

    Args:
        g, w: gradient and parameter, of one shape and any floating dtype.
        old: the array's states.
        plan: says in which form they are.
        decayed: whether weight decay applies to the array.
        shared: what all arrays share.
        skipped: how many arrays were skipped so far in this call.
    """
    usable = is_usable(g, shared.gradient_limit)

    def take(g: jax.Array, w: jax.Array, old: ArrayState, skipped: jax.Array) -> ArrayStep:
        return _take_step(g, w, old, plan, decayed, shared)._replace(skipped=skipped)

    def skip(g: jax.Array, w: jax.Array, old: ArrayState, skipped: jax.Array) -> ArrayStep:
        return _skip_step(g, old, _zeros(take, g, w, old, skipped).evidence)._replace(skipped=skipped + 1)

    operands = (g, w, old, skipped)
    if jax.default_backend() != "cpu" or devices_of(g) > 1:
        # An accelerator would wait for the host at each branch, so both sides are computed and one is selected.  On a
        # mesh of CPU devices, sums inside a branch and sums outside could block each other for ever.
        return _select(usable, take(*operands), skip(*operands))
    if isinstance(usable, jax.core.Tracer):
        step: ArrayStep = jax.lax.cond(usable, take, skip, *operands)
        return step
    return take(*operands) if usable else skip(*operands)  # outside jit, cond compiles at each call


def step_batch(
    g: jax.Array, w: jax.Array, old: ArrayState, plan: StatePlan, decayed: bool, shared: Shared, skipped: jax.Array
) -> ArrayStep:
    """The steps of one batch: `step_array` with a leading axis on all but `skipped`."""

    def one(g: jax.Array, w: jax.Array, old: ArrayState) -> ArrayStep:
        taken = _take_step(g, w, old, plan, decayed, shared)
        nothing = jax.tree.map(jnp.zeros_like, taken.evidence)
        return _select(is_usable(g, shared.gradient_limit), taken, _skip_step(g, old, nothing))

    def all_of_them(g: jax.Array, w: jax.Array, old: ArrayState, skipped: jax.Array) -> ArrayStep:
        steps = jax.vmap(one)(g, w, old)
        return steps._replace(skipped=skipped + jnp.sum(steps.skipped))

    operands = (g, w, old, skipped)
    if jax.default_backend() != "cpu" or devices_of(g) > 1 or not isinstance(skipped, jax.core.Tracer):
        return all_of_them(*operands)
    # The condition always holds, but the compiler cannot know that.  The branch saves time: without it the compiler
    # computes the whole step once more for each array that is cut out of the result.
    step: ArrayStep = jax.lax.cond(skipped >= 0, all_of_them, functools.partial(_zeros, all_of_them), *operands)
    return step


def _zeros(step: Callable[..., ArrayStep], *operands: Any) -> ArrayStep:
    """Zeros in the shapes of what the step returns."""
    zeros: ArrayStep = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, *operands))
    return zeros


def _select(condition: jax.Array, a: ArrayStep, b: ArrayStep) -> ArrayStep:
    selected: ArrayStep = jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
    return selected


def _skip_step(g: jax.Array, old: ArrayState, evidence: Evidence) -> ArrayStep:
    state = old._replace(skipped_steps=jnp.minimum(old.skipped_steps, MAX_STEP - 1) + 1)
    return ArrayStep(jnp.full(g.shape, -0.0, jnp.float32), state, evidence, jnp.ones([], jnp.int32))


def _take_step(
    g: jax.Array, w: jax.Array, old: ArrayState, plan: StatePlan, decayed: bool, shared: Shared
) -> ArrayStep:
    config, rates, writer = shared.config, shared.rates, shared.writer
    beta1, beta2, beta3 = map(decay, config.betas)
    g, w = g.astype(jnp.float32), w.astype(jnp.float32)
    age = jnp.minimum(old.age, MAX_STEP - 1) + 1
    t = age.astype(jnp.float32)

    # Second moment
    q = jnp.square(g) + f32(constants.SQUARE_FLOOR)
    v = equations.average_moment(beta2, read_nonnegative(old.exp_avg_sq), q, plan)
    root = equations.root_second_moment(v, beta2, t)

    # Normalized gradient
    mean_square, growth = equations.growth(q, v, beta2, t, plan)
    u = jnp.clip(quotient(g, growth) / root, -f32(config.update_clip), f32(config.update_clip))

    # Momentum
    m = ema(beta1, read_signed(old.exp_avg), u)
    m_hat = quotient(m, one_minus_power(beta1, t))

    # Confidence.  At an array's first step m̂ is u itself, and float32 would leave noise in the difference.
    e = jnp.where(age == 1, f32(0), jnp.square(u - m_hat))
    r_hat, r = equations.confidence(read_nonnegative(old.exp_avg_res), e, beta3, t, plan)
    d = m_hat / jnp.sqrt(r_hat + f32(config.confidence_floor))

    # Torque
    s, torque_mean = None, old.torque_mean
    if config.torque:
        last_s = None if old.s is None else read_signed(old.s)
        gamma = decay(config.torque_decay)
        d, s, torque_mean = equations.torque(d, u, last_s, gamma, shared.warming, old.torque_mean)

    # Spatial factor, from the variances before this step
    kappa, spatial_variance = None, None
    if old.spatial_variance is not None:
        kappa = equations.spatial_factor(old.spatial_variance)
        variance = equations.row_variance(d, plan)
        spatial_variance = ema(_SPATIAL, old.spatial_variance, variance)

    # Learning rate and weight decay
    delta = rates.rows(old.lr_mask, kappa) * d
    walk = old.walk
    if old.walk is not None and plan.has_walk:
        walk = new_walk(old.walk, delta, shared.keep, shared.warming, plan)
    b, background_scale = jnp.ones([], jnp.float32), old.background_scale
    if config.background_regularization:
        b, background_scale = equations.background(v, root, old.background_scale, beta2, t)
    decays = not isinstance(shared.weight_decay, (int, float)) or shared.weight_decay != 0
    if decayed and decays:
        delta = delta + rates.array() * jnp.asarray(shared.weight_decay, jnp.float32) * b * w

    # An infinite weight would decay by ∞ or by 0 · ∞ and become NaN; with a finite update it stays infinite.
    delta = jnp.nan_to_num(delta)

    # Votes, which enter the rate of the next step
    vote, last_polarity = None, old.last_polarity
    if old.last_polarity is not None and plan.has_last_polarity:
        last_negative = unpack_bits(old.last_polarity, plan.shape)
        vote = count_array(g, last_negative, old.age > 0, plan)
        negative = jnp.where(g == 0, last_negative, g < 0)
        last_polarity = jnp.where(shared.warming, pack_bits(negative), old.last_polarity)

    new = ArrayState(
        age=age,
        skipped_steps=old.skipped_steps,
        torque_mean=torque_mean,
        background_scale=background_scale,
        exp_avg=writer.signed(m, old.exp_avg, Slot.exp_avg),
        exp_avg_sq=writer.nonnegative(v, old.exp_avg_sq, Slot.exp_avg_sq),
        exp_avg_res=writer.nonnegative(r, old.exp_avg_res, Slot.exp_avg_res),
        s=old.s if old.s is None or s is None else writer.signed(s, old.s, Slot.s),
        last_polarity=last_polarity,
        lr_mask=old.lr_mask,
        spatial_variance=spatial_variance,
        walk=walk,
    )
    return ArrayStep(-delta, new, evidence(g, mean_square, vote, old.walk is not None, plan), jnp.zeros([], jnp.int32))
