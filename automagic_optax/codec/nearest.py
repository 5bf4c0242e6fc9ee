"""Finds the nearest codebook value by looking it up in tables (`docs/algorithm.md`, sections 3.5 and 3.6).

Thresholds are the codebook's values and the borders between them, in ascending order.  The number of thresholds ≤ |y|
(the half steps) gives the nearest value and the side of it on which |y| lies.  A bin is all float32 numbers with the
same exponent and first bits of the mantissa.  It contains at most one threshold, so one word says how many thresholds
lie below the bin and where the next one is.  The signed codebook is symmetric about zero, so both search |y| only.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import codebook_midpoints, dynamic_codebook

_LOWEST = np.float32(2.0**-24)
"""All thresholds lie above this, so all smaller values share the first bin."""
_COUNT_SHIFT = 17
"""A bin's word: from this bit on the count; below it where in the bin the next threshold is, at most 2¹⁶."""


class _Tables(NamedTuple):
    dropped_bits: int  # how many bits of a float32 do not count for its bin
    first_bin: int
    bins: np.ndarray  # int32 (bins,): the words
    nearest: np.ndarray  # float32 (half steps,): the nearest value's magnitude
    gap: np.ndarray  # float32 (half steps,): between the two values around |y|
    top: int  # the largest distance from zero, in codes


@cache
def _tables(signed: bool) -> _Tables:
    zero = 127 if signed else 0
    dropped = 16 if signed else 15
    values, midpoints = dynamic_codebook(signed)[zero:], codebook_midpoints(signed)[zero:]
    # A tie goes to the even code.  Where that is the lower one, the border is the next float32.
    ties_up = (zero + np.arange(len(midpoints)) + 1) % 2 == 0
    thresholds = np.empty(2 * len(midpoints), np.float32)
    thresholds[0::2] = np.where(ties_up, midpoints, np.nextafter(midpoints, np.float32(2)))
    thresholds[1::2] = values[1:]

    first_bin, last_bin = (int(x.view(np.uint32)) >> dropped for x in (_LOWEST, np.float32(1)))
    edges = (np.arange(first_bin, last_bin + 1, dtype=np.uint32) << np.uint32(dropped)).view(np.float32)
    edges[0] = 0
    below = np.searchsorted(thresholds, edges, side="right")
    inside = np.append(np.searchsorted(thresholds, edges[1:], side="left"), len(thresholds)) - below
    if inside.max() > 1:
        raise AssertionError("a bin holds two thresholds: the search needs more bits of the mantissa")
    following = np.append(thresholds, np.float32(np.inf))[below].view(np.uint32)
    place = np.where(inside > 0, following & np.uint32((1 << dropped) - 1), np.uint32(1 << dropped))

    lower = np.arange(len(thresholds) + 1) // 2
    upper = np.minimum(lower + 1, len(values) - 1)
    return _Tables(
        dropped_bits=dropped,
        first_bin=first_bin,
        bins=((below.astype(np.uint32) << np.uint32(_COUNT_SHIFT)) | place).astype(np.int32),
        nearest=values[(np.arange(len(thresholds) + 1) + 1) // 2],
        gap=np.where(upper > lower, np.abs(values[upper] - values[lower]), np.float32(1)),  # the top has no error
        top=len(values) - 1,
    )


def _half_steps(magnitude: jax.Array, tables: _Tables) -> jax.Array:
    """How many thresholds are ≤ the magnitude.  Even: it is at or above its nearest value; odd: below."""
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    index = jnp.clip((bits >> tables.dropped_bits) - tables.first_bin, 0, len(tables.bins) - 1)
    word = take(tables.bins, index)
    place = bits & ((1 << tables.dropped_bits) - 1)
    return (word >> _COUNT_SHIFT) + (place >= (word & ((1 << _COUNT_SHIFT) - 1))).astype(jnp.int32)


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
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
