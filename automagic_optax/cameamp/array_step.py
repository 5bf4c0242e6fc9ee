"""One array's step: section 5 of the page from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import MAX_STEP, Config, Decay, Slot, StatePlan, decay
from automagic_core.config import constants
from automagic_optax.arrays.means import quotient
from automagic_optax.arrays.usable import is_usable
from automagic_optax.cameamp import equations as section5
from automagic_optax.cameamp.learning_rate import Rates, Votes, count_array
from automagic_optax.cameamp.states import ArrayState
from automagic_optax.codec.polarity import pack_bits, unpack_bits
from automagic_optax.codec.stored import Writer, read_nonnegative, read_signed
from automagic_optax.sharding.placement import devices_of

f32 = np.float32
_SPATIAL: Decay = decay(constants.SPATIAL_DECAY)


class Shared(NamedTuple):
    """What all arrays have in common at one step.

    Attributes:
        config: hyperparameters.
        weight_decay: a number or a traced scalar.
        warming: boolean scalar, t ≤ `warmup_steps`.
        rates: the learning rates.
        writer: how states are stored.
        gradient_limit: a gradient with an element above this in magnitude is not used.
    """

    config: Config
    weight_decay: Any
    warming: jax.Array
    rates: Rates
    writer: Writer
    gradient_limit: float


class ArrayStep(NamedTuple):
    """What the step of one array, or of a batch with a leading axis, gives.

    Attributes:
        update: float32, to be added to the parameter.
        state: the array's new states.
        vote: None where none is held.
        skipped: int32, how many arrays were skipped so far in this call.
    """

    update: jax.Array
    state: ArrayState
    vote: Votes | None
    skipped: jax.Array


def step_array(
    g: jax.Array, w: jax.Array, old: ArrayState, plan: StatePlan, decayed: bool, shared: Shared, skipped: jax.Array
) -> ArrayStep:
    """One array's step, or none where an element of its gradient is not finite (section 6).

    A skipped array has negative zeros for its update, which leave a parameter of −0.0 as it is, its old states, and one
    more of `skipped_steps`.  The count of skipped arrays is passed from array to array: so on a CPU each waits for the
    one before, and only one array's float32 values are in memory at a time.

    Args:
        g, w: gradient and parameter, in the same shape and any floating dtype.
        old: the array's states.
        plan: how they are kept.
        decayed: whether weight decay applies to the array.
        shared: what all arrays have in common.
        skipped: arrays skipped so far in this call.
    """
    usable = is_usable(g, shared.gradient_limit)

    def take(g: jax.Array, w: jax.Array, old: ArrayState, skipped: jax.Array) -> ArrayStep:
        return _take_step(g, w, old, plan, decayed, shared)._replace(skipped=skipped)

    def skip(g: jax.Array, w: jax.Array, old: ArrayState, skipped: jax.Array) -> ArrayStep:
        vote = jax.eval_shape(take, g, w, old, skipped).vote
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), vote)
        return _skip_step(g, old, nothing)._replace(skipped=skipped + 1)

    operands = (g, w, old, skipped)
    if jax.default_backend() != "cpu" or devices_of(g) > 1:
        # An accelerator would wait for the host at each branch; it computes both and selects.  On a mesh of a CPU's
        # devices sums inside a branch would not keep their order with those outside, and wait for each other for ever.
        return _select(usable, take(*operands), skip(*operands))
    if isinstance(usable, jax.core.Tracer):
        return jax.lax.cond(usable, take, skip, *operands)
    return take(*operands) if usable else skip(*operands)  # outside jit a branch would be compiled anew at each call


def step_batch(
    g: jax.Array, w: jax.Array, old: ArrayState, plan: StatePlan, decayed: bool, shared: Shared, skipped: jax.Array
) -> ArrayStep:
    """The steps of several small arrays of one form: `step_array` with a leading axis on all but `skipped`."""

    def one(g: jax.Array, w: jax.Array, old: ArrayState) -> ArrayStep:
        taken = _take_step(g, w, old, plan, decayed, shared)
        nothing = jax.tree.map(jnp.zeros_like, taken.vote)
        return _select(is_usable(g, shared.gradient_limit), taken, _skip_step(g, old, nothing))

    def all_of_them(g: jax.Array, w: jax.Array, old: ArrayState, skipped: jax.Array) -> ArrayStep:
        steps = jax.vmap(one)(g, w, old)
        return steps._replace(skipped=skipped + jnp.sum(steps.skipped))

    operands = (g, w, old, skipped)
    if jax.default_backend() != "cpu" or devices_of(g) > 1 or not isinstance(skipped, jax.core.Tracer):
        return all_of_them(*operands)
    # The count of skipped arrays is never negative, which the compiler cannot know.  The branch keeps it from computing
    # the whole step once more for each array that is cut out of the result.
    return jax.lax.cond(skipped >= 0, all_of_them, _never_taken(all_of_them), *operands)


def _never_taken(step: Callable[..., ArrayStep]) -> Callable[..., ArrayStep]:
    """A branch of the same types as the step's."""

    def zeros(*operands: Any) -> ArrayStep:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, *operands))

    return zeros


def _select(condition: jax.Array, a: ArrayStep, b: ArrayStep) -> ArrayStep:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _skip_step(g: jax.Array, old: ArrayState, vote: Votes | None) -> ArrayStep:
    state = old._replace(skipped_steps=jnp.minimum(old.skipped_steps, MAX_STEP - 1) + 1)
    return ArrayStep(jnp.full(g.shape, -0.0, jnp.float32), state, vote, jnp.ones([], jnp.int32))


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
    v = section5.average_moment(beta2, read_nonnegative(old.exp_avg_sq), q, plan)
    root = section5.root_second_moment(v, beta2, t)

    # Normalized gradient
    u = jnp.clip(g / root, -f32(config.update_clip), f32(config.update_clip))

    # Momentum
    m = section5.average(beta1, read_signed(old.exp_avg), u)
    m_hat = quotient(m, section5.remainder(beta1, t))

    # Confidence
    # At its first step an array's m̂ is u itself; what float32 leaves of the difference is noise.
    e = jnp.where(age == 1, f32(0), jnp.square(u - m_hat))
    r_hat, r = section5.confidence(read_nonnegative(old.exp_avg_res), e, beta3, t, plan)
    d = m_hat / jnp.sqrt(r_hat + f32(config.confidence_floor))

    # Torque
    s, torque_mean = None, old.torque_mean
    if config.torque:
        last_s = None if old.s is None else read_signed(old.s)
        gamma = decay(config.torque_decay)
        d, s, torque_mean = section5.torque(d, u, last_s, gamma, shared.warming, old.torque_mean)

    # Spatial factor, from the variances of the step before
    kappa, spatial_variance = None, None
    if old.spatial_variance is not None:
        kappa = section5.spatial_factor(old.spatial_variance)
        variance = section5.row_variance(d, plan)
        spatial_variance = section5.average(_SPATIAL, old.spatial_variance, variance)

    # Learning rate and weight decay
    delta = rates.rows(old.lr_mask, kappa) * d
    b, background_scale = jnp.ones([], jnp.float32), old.background_scale
    if config.background_regularization:
        b, background_scale = section5.background(v, root, old.background_scale, beta2, t)
    if decayed and not _is_zero(shared.weight_decay):
        delta = delta + rates.array() * jnp.asarray(shared.weight_decay, jnp.float32) * b * w

    # Learning-rate mask: the votes enter the rate of the next step
    vote, last_polarity = None, None
    if old.last_polarity is not None:
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
    )
    return ArrayStep(-delta, new, vote, jnp.zeros([], jnp.int32))


def _is_zero(weight_decay: Any) -> bool:
    return isinstance(weight_decay, (int, float)) and weight_decay == 0
