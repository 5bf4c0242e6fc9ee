"""The size from which arrays are stored in 8 bits, as a run goes on (docs/algorithm.md, section 10.1)."""

from __future__ import annotations

import math

FIRST_SIZE, LAST_SIZE = 8192, 2048
"""The threshold falls from the first to the last size in the middle of the run."""
NO_ARRAY = 2**63 - 1
"""A threshold that no array reaches."""


def progressive_min_8bit_size(step: int, total_steps: int) -> int:
    """The least size of an array in 8 bits after a number of steps.

    In the first 20 % of the steps no array has 8 bits.  From 20 % to 80 % the threshold falls geometrically, from 8192
    over 4096 at half time to 2048.  In the last 20 % there is no threshold; the other rules of section 3.1 still hold.

    Args:
        step: how many steps are over, ≥ 0; beyond `total_steps` nothing changes any more.
        total_steps: how many there will be, ≥ 1.

    Raises:
        ValueError: a number outside its range; the message names it.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps = {total_steps!r} is not valid; valid: an integer ≥ 1")
    if step < 0:
        raise ValueError(f"step = {step!r} is not valid; valid: an integer ≥ 0")
    # Integers, so that a phase ends at the same step everywhere.
    if 5 * step < total_steps:
        return NO_ARRAY
    if 5 * step >= 4 * total_steps:
        return 1
    progress = (step / total_steps - 0.2) / 0.6
    return round(FIRST_SIZE * math.pow(LAST_SIZE / FIRST_SIZE, progress))
