"""Random numbers from counters, the same bits as in `automagic_core` (docs/algorithm.md, section 3.7)."""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_core.codec.random_bits import MIX_MULTIPLIERS

# int32 products wrap round, which is arithmetic modulo 2³².  A multiplier above 2³¹ is written minus 2³².
_MULTIPLIERS = tuple(m - 2**32 if m >= 2**31 else m for m in MIX_MULTIPLIERS)


def _shifted(x: Tensor, bits: int) -> Tensor:
    # >> on int32 copies the sign bit into the freed bits; an unsigned shift leaves zeros there.
    return (x >> bits).bitwise_and_(2 ** (32 - bits) - 1)


def mix32(x: Tensor) -> Tensor:
    """Scrambles 32-bit words.

    Args:
        x: int32 of any shape, the bit patterns of unsigned words.

    Returns:
        int32 of the same shape, again bit patterns; a new tensor.
    """
    x = x ^ _shifted(x, 16)
    x.mul_(_MULTIPLIERS[0])
    x.bitwise_xor_(_shifted(x, 15))
    x.mul_(_MULTIPLIERS[1])
    return x.bitwise_xor_(_shifted(x, 16))


def random_unit(key: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Random numbers r in [0, 1) with 24 bits, for the first `count` elements in row-major order.

    Args:
        key: `automagic_core.rounding_key` of the step, the slot and the array's size, or its bits as 0-d int32.
        count: how many numbers, at most 2³¹ − 1.
        device: the device of the numbers.

    Returns:
        float32 of shape (count,).
    """
    return _shifted(_bits(key, count, device), 8).float().mul_(2.0**-24)


def signs(key: int | Tensor, count: int, device: torch.device) -> Tensor:
    """The signs of the walk, −1 or 1, for the first `count` elements (section 5.8): float32 of shape (count,).

    Args:
        key: `automagic_core.rounding_key` of step 0, of the walk's slot and the array's size.
        count, device: as in `random_unit`.
    """
    return (_bits(key, count, device) >> 31).bitwise_or_(1).float()


def signed_key(key: int) -> int:
    """The number of int32 with the bits of a key."""
    return key - 2**32 if key >= 2**31 else key


def _bits(key: int | Tensor, count: int, device: torch.device) -> Tensor:
    added = key if isinstance(key, Tensor) else signed_key(key)
    return mix32(torch.arange(count, dtype=torch.int32, device=device).add_(added))
