"""Converts between a stored average and its bias-corrected value (docs/algorithm.md, sections 1.5 and 5.3)."""

from __future__ import annotations

import math

from automagic_core.arrays.decay import decay


def weight_seen(beta: float, age: int) -> float:
    """1 − β^age, the divisor that corrects a moving average that began at zero."""
    return -math.expm1(age * decay(beta).log)


def stored_confidence(r_hat: float, beta3: float, age: int) -> float:
    """The `exp_avg_res` whose corrected value after `age` steps is r̂: r̂ = (r + 1 − β₃) / (2 − β₃ − β₃^age)."""
    complement = decay(beta3).complement
    return r_hat * (complement + weight_seen(beta3, age)) - complement
