"""Rounds low-precision parameters so that small updates survive (`docs/algorithm.md`, section 5.9).

Rounded to nearest, an update below half a unit in the last place vanishes: on weights of 0.02 in bfloat16, 85 % of the
updates at a learning rate of 1e-5.  With stochastic rounding the new parameter is right on average.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_core import MAX_STEP, Slot
from automagic_optax.arrays.batches import Batched
from automagic_optax.arrays.checks import check_dtypes, check_params, dtype_of
from automagic_optax.arrays.containers import flatten_like, unflatten_like
from automagic_optax.arrays.own_rules import caller_is_strict
from automagic_optax.arrays.with_types import with_types
from automagic_optax.codec.random_bits import random_unit
from automagic_optax.sharding.placement import scalar_like


class RoundToParametersState(NamedTuple):
    """`step`: int32 scalar, t, for the random bits."""

    step: jax.Array


def round_to_parameters(stochastic: bool = True) -> optax.GradientTransformationExtraArgs:
    """Turns float32 updates into the exact differences between rounded new parameters and old ones.

    Put it last in a chain.  For bfloat16 and float16 parameters the update becomes the float32 difference between
    round(w + update) and w, which ``optax.apply_updates`` adds without a further error.  For float32 and float64
    parameters the update is cast to their dtype.

    Args:
        stochastic: round to one of the two neighbours, so that the result is right on average; else to the nearest.

    Returns:
        A transformation whose update needs `params`.

    Reference: section 5.9.
    """

    def init(params: Any) -> RoundToParametersState:
        check_dtypes(params)
        return RoundToParametersState(scalar_like(params, 0, jnp.int32))

    def update(
        updates: Any, state: RoundToParametersState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, RoundToParametersState]:
        del extra_args
        check_params(params)
        step = jnp.minimum(state.step, MAX_STEP - 1) + 1

        def rounded(u: jax.Array | None, w: jax.Array) -> jax.Array | None:
            if u is None or w.dtype not in (jnp.bfloat16, jnp.float16):
                return u if u is None else u.astype(dtype_of(w))
            old = w.astype(jnp.float32)
            new = old + u.astype(jnp.float32)
            if stochastic:
                new = round_stochastically(new, w.dtype, random_unit(step, Slot.parameters, w.shape))
            else:
                new = new.astype(w.dtype)
            # A parameter that does not move keeps its bits, even −0.0.  An infinite one stays: ∞ − ∞ would be NaN.
            still = (u == 0) | jnp.isinf(old)
            difference = jnp.where(still, np.float32(-0.0), new.astype(jnp.float32) - old)
            # A strict caller may add numbers of one dtype only.
            return _in_place_of(u, difference).astype(w.dtype if caller_is_strict() else jnp.float32)

        leaves = updates.flat() if isinstance(updates, Batched) else flatten_like(params, updates)
        new_updates = [rounded(u, w) for u, w in zip(leaves, jax.tree.leaves(params), strict=True)]
        return unflatten_like(params, new_updates), RoundToParametersState(step)

    return with_types(optax.GradientTransformationExtraArgs(init, update))


@jax.custom_jvp
def _in_place_of(u: jax.Array, difference: jax.Array) -> jax.Array:
    """The difference.  Its derivative is that of u, as if nothing had been rounded."""
    return difference


_in_place_of.defjvps(lambda du, out, u, difference: du.astype(jnp.float32), None)


def round_stochastically(x: jax.Array, dtype: Any, random: jax.Array) -> jax.Array:
    """One of the two neighbours of x in `dtype`, the farther from zero with probability |x − near| / |far − near|.

    No value is converted to `dtype` before it is one of its numbers: compilers leave out such a rounding.

    Args:
        x: float32 array.
        dtype: bfloat16 or float16.
        random: r in [0, 1), float32, of x's shape.

    Returns:
        Array of `dtype`; a finite x never becomes infinite.
    """
    largest = np.float32(jnp.finfo(dtype).max)
    x = jnp.where(jnp.isinf(x), x, jnp.clip(x, -largest, largest))
    # Some bits of a NaN would not stay one.
    bits = jnp.where(jnp.isnan(x), 0x7FC00000, jax.lax.bitcast_convert_type(x, jnp.int32))
    if jnp.dtype(dtype) == jnp.bfloat16:
        # A bfloat16 is the upper half of a float32.  The lower half says how far x is on the way to the next one.
        up = random < (bits & 0xFFFF).astype(jnp.float32) * np.float32(2**-16)
        upper = (bits + (up.astype(jnp.int32) << 16)) >> 16
        return jax.lax.bitcast_convert_type(upper.astype(jnp.int16), jnp.bfloat16)
    # The gap between two float16 is 2⁻¹⁰ of the power of two below x, and 2⁻²⁴ at least.
    power = jnp.maximum(bits & 0x7F800000, (127 - 14) << 23)
    exponent = power - (10 << 23)
    gap, inverse_gap = (jax.lax.bitcast_convert_type(e, jnp.float32) for e in (exponent, (254 << 23) - exponent))
    gaps = jnp.abs(x) * inverse_gap
    low = jnp.floor(gaps)
    up = random < gaps - low
    return jnp.copysign((low + up) * gap, x).astype(dtype)
