"""Exponential moving averages whose constants are formed in float64 (section 1, "Time")."""

from __future__ import annotations

import math
from typing import NamedTuple


class Decay(NamedTuple):
    """The constants of one β: multiply by `beta`, add `complement` times the new value."""

    beta: float
    complement: float
    """1 − β."""
    log: float
    """ln β, or −10⁴ for β = 0, which keeps 0 · ln β finite and still makes every positive power vanish."""


def decay(beta: float) -> Decay:
    """The constants for a β in [0, 1).

    1 − βᵗ is then ``-expm1(t * log)``: for β near 1 it would lose its digits in float32.
    """
    return Decay(beta, 1.0 - beta, math.log(beta) if beta > 0 else -1e4)
