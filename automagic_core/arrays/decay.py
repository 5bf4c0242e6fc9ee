"""The constants of a moving average, formed in float64 (docs/algorithm.md, section 1.5)."""

from __future__ import annotations

import math
from typing import NamedTuple


class Decay(NamedTuple):
    """The constants of one β.  A new average is `beta` · old + `complement` · value."""

    beta: float
    complement: float
    """1 − β."""
    log: float
    """ln β.  For β = 0 it is −10⁴, which keeps 0 · ln β finite and makes all positive powers 0 in float32."""


def decay(beta: float) -> Decay:
    """The constants for a β in [0, 1).

    1 − βᵗ is computed as ``-expm1(t * log)``, since it would lose its digits in float32 for β near 1.
    """
    return Decay(beta, 1.0 - beta, math.log(beta) if beta > 0 else -1e4)
