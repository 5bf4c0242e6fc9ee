"""Progressive quantization: from which size on arrays are stored in 8 bits as a run goes on.

Early statistics change fast and matter most, so states begin in 32 bits; large arrays, which are the memory, go to
8 bits first.
"""

from __future__ import annotations

FIRST_SIZE, LAST_SIZE = 8192, 2048
"""Between them the threshold falls in the middle phase."""
NO_ARRAY = 2**63 - 1
"""A threshold that no array reaches."""


def progressive_min_8bit_size(step: int, total_steps: int) -> int:
    """The least size of an array in 8 bits after a number of steps.

    The first 20 % of the steps: no array.  Then, up to 80 %, the threshold falls geometrically in steps, from 8192 by
    way of 4096 at one half to 2048: sizes of arrays differ by factors, so each halving gets as much time as the last.
    The last 20 %: every array, however small; of the rules of section 3 all but `min_8bit_size` hold on.

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
    # In integers, so that a phase ends at the same step everywhere.
    if 5 * step < total_steps:
        return NO_ARRAY
    if 5 * step >= 4 * total_steps:
        return 1
    progress = (step / total_steps - 0.2) / 0.6
    return round(FIRST_SIZE * (LAST_SIZE / FIRST_SIZE) ** progress)
