"""Exponential moving averages and their bias correction, in float32."""

from __future__ import annotations

from torch import Tensor, expm1

from automagic_core import Decay


def ema(old: Tensor, value: Tensor, beta: Decay) -> Tensor:
    """β · old + (1 − β) · value."""
    return old.lerp(value, beta.complement)


def one_minus_power(beta: Decay, age: Tensor) -> Tensor:
    """1 − β^age in the shape of `age`, float32."""
    return expm1(age * beta.log).neg_()
