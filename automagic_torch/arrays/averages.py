"""Moving averages and their bias correction, in float32 (docs/algorithm.md, section 1.5)."""

from __future__ import annotations

import torch
from torch import Tensor, expm1

from automagic_core import Decay


def ema(decay: Decay, old: Tensor, value: Tensor) -> Tensor:
    """β · old + (1 − β) · value."""
    return old.lerp(value, decay.complement)


def one_minus_power(decay: Decay, age: Tensor) -> Tensor:
    """1 − β^age in the shape of `age`, float32."""
    x = age * decay.log
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        # A compiled vector of expm1 is exp(x) − 1, which is off by 10⁻⁵ of itself in float32, by 10⁻¹² in float64.
        return expm1(x.double()).neg().float()
    return expm1(x).neg_()
