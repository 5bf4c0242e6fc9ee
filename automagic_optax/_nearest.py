"""The nearest code of a normalized value, in two table look-ups and one comparison.

Between two powers of two the codebook's midpoints lie at least 1/128 of an octave apart, so the exponent and the
first seven bits of the mantissa of |y| name a bin with at most one midpoint in it.  One small table gives the code at
the bin's lower edge, a second the value from which the next code is nearer.  The signed map is symmetric about its
zero, so both maps search |y| only.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import codebook_midpoints

_DROPPED_BITS = 16
"""Bits of a float32 below its sign, exponent and seven bits of mantissa."""
_LOWEST = np.float32(2.0**-24)
"""Every midpoint lies above this, so all smaller values share the first bin."""


class _Search(NamedTuple):
    first_bin: int
    start: np.ndarray  # uint8 (bins,): distance from the code of zero at the bin's lower edge
    border: np.ndarray  # float32 (distances,): the least |y| that is nearer to the next distance


@cache
def _search_tables(signed: bool) -> _Search:
    zero = 127 if signed else 0
    midpoints = codebook_midpoints(signed)[zero:]
    # A tie goes to the even code: where that is the lower one, the border is the next float.
    ties_up = (zero + np.arange(len(midpoints)) + 1) % 2 == 0
    border = np.where(ties_up, midpoints, np.nextafter(midpoints, np.float32(2)))
    first_bin = int(_LOWEST.view(np.uint32)) >> _DROPPED_BITS
    last_bin = int(np.float32(1).view(np.uint32)) >> _DROPPED_BITS
    edges = (np.arange(first_bin, last_bin + 1, dtype=np.uint32) << np.uint32(_DROPPED_BITS)).view(np.float32)
    edges[0] = 0
    start = np.searchsorted(border, edges, side="right")
    inside = np.diff(np.append(start, len(border)))
    if inside.max() > 1:
        raise AssertionError("a bin holds two midpoints: the search needs more bits of the mantissa")
    border = np.append(border, np.float32(np.inf))  # beyond the last code nothing is nearer
    return _Search(first_bin, start.astype(np.uint8), border.astype(np.float32))


def nearest_code(y: jax.Array, signed: bool) -> jax.Array:
    """The code of the codebook value nearest to y; a tie goes to the even code (section 3).

    Args:
        y: float32 values in [−1, 1], of any shape.
        signed: which codebook.

    Returns:
        int32 array of codes in [0, 255], of y's shape.
    """
    tables = _search_tables(signed)
    magnitude = jnp.abs(y)
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32) >> _DROPPED_BITS
    bin_index = jnp.clip(bits - tables.first_bin, 0, len(tables.start) - 1)
    distance = take(tables.start, bin_index).astype(jnp.int32)
    distance = distance + (magnitude >= take(tables.border, distance)).astype(jnp.int32)
    if not signed:
        return distance
    # The negative side has no −1: its last value is −0.993, 127 codes below zero.
    return 127 + jnp.where(y < 0, -jnp.minimum(distance, 127), distance)


def take(table: np.ndarray, index: jax.Array) -> jax.Array:
    """``table[index]`` for indices known to be in range, which spares the check for each element."""
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")
