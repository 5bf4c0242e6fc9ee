"""Tables in which the nearest codebook value is looked up (docs/algorithm.md, sections 3.5 and 3.6).

Thresholds are the codebook's values and the borders between them, in ascending order.  The number of thresholds ≤ |y|
(the half steps) gives the nearest value and the side of it on which |y| lies.  A bin is all float32 numbers with the
same exponent and first bits of the mantissa.  It contains at most one threshold, so one word says how many thresholds
lie below the bin and where the next one is.  The signed codebook is symmetric about zero, so both search |y| only.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from automagic_core.codec.codebook import codebook_midpoints, dynamic_codebook

COUNT_SHIFT = 17
"""A bin's word: from this bit on the count; below it where in the bin the next threshold is, at most 2¹⁶."""
_LOWEST = np.float32(2.0**-24)
"""All thresholds lie above this, so all smaller values share the first bin."""


class HalfSteps(NamedTuple):
    """The tables of one codebook."""

    dropped_bits: int
    """How many bits of a float32 do not count for its bin."""
    first_bin: int
    """The bits of a float32 that do count, in the first bin."""
    bins: np.ndarray
    """int32 (bins,): the words."""
    nearest: np.ndarray
    """float32 (half steps,): the nearest value's magnitude."""
    gap: np.ndarray
    """float32 (half steps,): between the two values around |y|; infinite above the last one."""
    top: int
    """The largest distance from zero, in codes."""


@cache
def half_steps(signed: bool) -> HalfSteps:
    """The tables of the signed or the unsigned codebook."""
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

    steps = np.arange(len(thresholds) + 1)
    lower = steps // 2
    upper = np.minimum(lower + 1, len(values) - 1)
    return HalfSteps(
        dropped_bits=dropped,
        first_bin=first_bin,
        bins=((below.astype(np.uint32) << np.uint32(COUNT_SHIFT)) | place).astype(np.int32),
        nearest=values[(steps + 1) // 2],
        gap=np.where(upper > lower, np.abs(values[upper] - values[lower]), np.float32(np.inf)),
        top=len(values) - 1,
    )
