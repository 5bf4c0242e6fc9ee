"""Moving averages and their bias correction, in float32 (docs/algorithm.md, section 1.5)."""

from __future__ import annotations

from torch import Tensor, expm1

from automagic_core import Decay


def ema(decay: Decay, old: Tensor, value: Tensor) -> Tensor:
    """β · old + (1 − β) · value."""
    return old.lerp(value, decay.complement)


def one_minus_power(decay: Decay, age: Tensor) -> Tensor:
    """1 − β^age in the shape of `age`, float32."""
    return expm1(age * decay.log).neg_()
