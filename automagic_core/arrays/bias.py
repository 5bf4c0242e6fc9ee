"""Bias corrections of section 5 as numbers: between statistics as they are stored and what they estimate."""

from __future__ import annotations

import math

from automagic_core.arrays.decay import decay


def weight_seen(beta: float, age: int) -> float:
    """1 − β^age: the weight of the steps taken in a moving average that began at zero."""
    return -math.expm1(age * decay(beta).log)


def stored_confidence(r_hat: float, beta3: float, age: int) -> float:
    """The `exp_avg_res` that reads as r̂ after `age` steps: r with r̂ = (r + 1 − β₃) / (2 − β₃ − β₃^age).

    The elementwise form reads it after one more step, the factored one just so at its next step.
    """
    complement = decay(beta3).complement
    return r_hat * (complement + weight_seen(beta3, age)) - complement
