"""Finds the nearest codebook value by looking it up in tables (`docs/algorithm.md`, sections 3.5 and 3.6).

Thresholds are the codebook's values and the borders between them, in ascending order.  The number of thresholds ≤ |y|
(the half steps) gives the nearest value and the side of it on which |y| lies.  A bin is all float32 numbers with the
same exponent and first bits of the mantissa.  It contains at most one threshold, so one word says how many thresholds
lie below the bin and where the next one is.  The signed codebook is symmetric about zero, so both search |y| only.
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core.codec.half_steps import COUNT_SHIFT, HalfSteps, half_steps
from automagic_optax.sharding.explicit_mesh import untyped
from automagic_optax.sharding.placement import has_explicit_axes


@cache
def _tables(signed: bool) -> HalfSteps:
    tables = half_steps(signed)
    # The top has no error, so any gap does; an infinite one would alarm `jax_debug_infs`.
    return tables._replace(gap=np.where(np.isfinite(tables.gap), tables.gap, np.float32(1)))


def _half_steps(magnitude: jax.Array, tables: HalfSteps) -> jax.Array:
    """How many thresholds are ≤ the magnitude.  Even: it is at or above its nearest value; odd: below."""
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    index = jnp.clip((bits >> tables.dropped_bits) - tables.first_bin, 0, len(tables.bins) - 1)
    word = take(tables.bins, index)
    place = bits & ((1 << tables.dropped_bits) - 1)
    return (word >> COUNT_SHIFT) + (place >= (word & ((1 << COUNT_SHIFT) - 1))).astype(jnp.int32)


def _code(distance: jax.Array, y: jax.Array, signed: bool) -> jax.Array:
    if not signed:
        return distance
    # The negative side ends at −0.993, 127 codes below zero.
    return 127 + jnp.where(y < 0, -jnp.minimum(distance, 127), distance)


def nearest_code(y: jax.Array, signed: bool) -> jax.Array:
    """The code of the codebook value nearest to y; a tie goes to the even code (section 3.5).

    Args:
        y: float32 values in [−1, 1], of any shape.
        signed: which codebook.

    Returns:
        int32 array of codes in [0, 255], of y's shape.
    """
    half_steps = _half_steps(jnp.abs(y), _tables(signed))
    return _code((half_steps + 1) >> 1, y, signed)


def stochastic_code(y: jax.Array, signed: bool, random: jax.Array) -> jax.Array:
    """The nearest code, or with probability |error| / gap its neighbour on the other side of y (section 3.6).

    Args:
        y, signed: as for `nearest_code`.
        random: r in [0, 1), float32 of y's shape.

    Returns:
        int32 array of codes in [0, 255], of y's shape.
    """
    tables = _tables(signed)
    magnitude = jnp.abs(y)
    half_steps = _half_steps(magnitude, tables)
    distance = (half_steps + 1) >> 1
    neighbour = jnp.minimum(distance + 1 - 2 * (half_steps & 1), tables.top)
    error = jnp.abs(magnitude - take(tables.nearest, half_steps))
    probability = jnp.minimum(np.float32(1), error / take(tables.gap, half_steps))
    return _code(jnp.where(random < probability, neighbour, distance), y, signed)


def take(table: np.ndarray, index: jax.Array) -> jax.Array:
    """``table[index]`` for indices that are in range.  It saves the check of each index."""
    if has_explicit_axes(index):
        found: jax.Array = untyped(take, jax.typeof(index).sharding)(table, index)
        return found
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
