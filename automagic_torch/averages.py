"""Exponential moving averages and their bias correction, in float32."""

from __future__ import annotations

from torch import Tensor, expm1

from automagic_core import Decay


def ema(old: Tensor, value: Tensor, beta: Decay) -> Tensor:
    """β · old + (1 − β) · value."""
    return beta.beta * old + beta.complement * value


def one_minus_power(beta: Decay, age: Tensor) -> Tensor:
    """1 − β^age, float32 in the shape of the int32 `age`."""
    return -expm1(age * beta.log)
