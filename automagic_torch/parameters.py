"""Adding an update to a parameter: exactly, or rounded to bfloat16 and float16 (end of section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_core import Slot, rounding_key
from automagic_torch.random_bits import random_unit

HALF_DTYPES = (torch.bfloat16, torch.float16)
SUPPORTED_DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)


def add_update(p: Tensor, delta: Tensor, ok: Tensor, step: int, stochastic: bool) -> None:
    """p ← p + delta in place.

    Args:
        p: the parameter, one of `SUPPORTED_DTYPES`, any memory format.
        delta: float32 in the shape of p.
        ok: 0-d bool; False leaves every bit of p.
        step: t, for the random bits.
        stochastic: round half-precision parameters stochastically, else to nearest.
    """
    # A float64 weight is not passed through float32, which would move it even when delta is 0.
    new = p + delta.double() if p.dtype == torch.float64 else p.float() + delta
    if p.dtype in HALF_DTYPES:
        key = rounding_key(step, Slot.parameters, p.numel())
        new = stochastically_rounded(new, p.dtype, key) if stochastic else new.to(p.dtype)
    # An infinite weight that decays by an infinite amount would become NaN; it stays.
    p.copy_(torch.where(ok & ~new.isnan(), new, p))


def stochastically_rounded(x: Tensor, dtype: torch.dtype, key: int) -> Tensor:
    """Rounds to one of the two neighbours in `dtype`, without bias.

    Args:
        x: float32 of any shape and memory format.
        dtype: bfloat16 or float16.
        key: of the random numbers, `automagic_core.rounding_key`.

    Returns:
        `dtype`, the shape of x, contiguous.  A finite x stays finite.
    """
    x = x.contiguous()
    magnitude = x.abs()
    nearest = x.to(dtype)
    # Sign and magnitude: the next integer is the next value away from zero, for both signs.
    low_bits = nearest.view(torch.int16) - (nearest.abs().float() > magnitude).to(torch.int16)
    high_bits = low_bits + 1
    low = low_bits.view(dtype).abs().float()
    high = high_bits.view(dtype).abs().float()
    r = random_unit(key, x.numel(), x.device).view_as(x)
    # Beyond the largest finite value `high` is infinite and the quotient 0: the value stays finite.
    return torch.where(r < (magnitude - low) / (high - low), high_bits, low_bits).view(dtype)
