"""Decides which frequencies stage 3 damps (docs/algorithm.md, section 4.3)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=1024)
def last_kept_frequency(n1: int, n2: int) -> NDArray[np.int32]:
    """For each index along the first axis of an rfft2, the largest index along the second that is not damped.

    An entry (k₁, k₂) is damped where its frequency is above 0.3 cycles per sample.  This is decided in integers, so
    that both frameworks agree for every shape: 100 · ((k₁n₂)² + (k₂n₁)²) > 9 · (n₁n₂)².

    Args:
        n1: length of the first axis, with frequencies of both signs.
        n2: length of the second axis, of which the rfft2 keeps the indices 0 … n2 // 2.

    Returns:
        int32 of shape (n1,), read-only; −1 where everything is damped.
    """
    last = np.empty(n1, np.int32)
    for index in range(n1):
        k1 = min(index, n1 - index)  # frequencies above one half are negative ones
        room = 9 * (n1 * n2) ** 2 - 100 * (k1 * n2) ** 2
        last[index] = -1 if room < 0 else min(n2 // 2, _integer_root(room // (100 * n1 * n1)))
    last.setflags(write=False)
    return last


def _integer_root(x: int) -> int:
    """⌊√x⌋ of a Python integer, exact at any size."""
    root = int(x**0.5)
    while root * root > x:
        root -= 1
    while (root + 1) ** 2 <= x:
        root += 1
    return root
