"""Adds updates to parameters, which may be bfloat16 or float16 (docs/algorithm.md, section 5.9)."""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_torch.arrays.stacked import chosen
from automagic_torch.codec.random_bits import random_unit

HALF_DTYPES = (torch.bfloat16, torch.float16)
SUPPORTED_DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)


def add_updates(params: list[Tensor], before: Tensor, delta: Tensor, ok: Tensor, key: int | None) -> None:
    """Adds delta to parameters in place.

    Args:
        params: parameters of one shape, device and dtype (one of `SUPPORTED_DTYPES`), in any memory format.
        before: the same, stacked.
        delta: float32 in the shape of `before`.
        ok: (arrays,) bool; where it is False, an array keeps every value.
        key: the key of the random bits that round half-precision parameters; None rounds to nearest.
    """
    written(params, updated(before, delta, ok, key))


def written(params: list[Tensor], new: Tensor) -> None:
    """Writes stacked values into parameters."""
    if len(params) == 1 or any(p.is_neg() for p in params):  # torch writes into no list with one negated when read
        for p, x in zip(params, new.unbind(), strict=True):
            p.copy_(x)
    else:
        torch._foreach_copy_(params, new.unbind())


def updated(before: Tensor, delta: Tensor, ok: Tensor, key: int | Tensor | None) -> Tensor:
    """Stacked parameters after their updates; arguments as for `add_updates`."""
    # A float64 parameter in float32 would change even when delta is 0.
    new = before + delta.double() if before.dtype == torch.float64 else before.float() + delta
    if before.dtype in HALF_DTYPES:
        new = new.to(before.dtype) if key is None else stochastically_rounded(new, before.dtype, key)
    return chosen(ok, new, before)


def stochastically_rounded(x: Tensor, dtype: torch.dtype, key: int | Tensor) -> Tensor:
    """Rounds to one of the two neighbours in `dtype`, right on average.

    No value is converted to `dtype` before it is one of its numbers: compilers leave out such a rounding.

    Args:
        x: float32, arrays stacked along the first axis, contiguous.
        dtype: bfloat16 or float16.
        key: `automagic_core.rounding_key` of the random bits, which the arrays share.

    Returns:
        `dtype`, the shape of x, contiguous.  A finite x stays finite.
    """
    largest = torch.finfo(dtype).max
    x = torch.where(x.isinf(), x, x.clamp(-largest, largest))
    bits = torch.where(x == x, x.view(torch.int32), 0x7FC00000)  # some bits of a NaN would not stay one
    r = random_unit(key, x[0].numel(), x.device).view(x.shape[1:])
    if dtype == torch.bfloat16:
        # A bfloat16 is the upper half of a float32.  The lower half says how far x is on the way to the next one.
        up = r < (bits & 0xFFFF).float() * 2**-16
        return ((bits + (up.int() << 16)) >> 16).to(torch.int16).view(dtype)
    # The gap between two float16 is 2⁻¹⁰ of the power of two below x, and 2⁻²⁴ at least.
    power = (bits & 0x7F800000).clamp(min=(127 - 14) << 23)
    exponent = power - (10 << 23)
    gap, inverse_gap = exponent.view(torch.float32), ((254 << 23) - exponent).view(torch.float32)
    gaps = x.abs() * inverse_gap
    low = gaps.floor()
    up = r < gaps - low
    return ((low + up) * gap).copysign(x).to(dtype)
