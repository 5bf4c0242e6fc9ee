"""Sign bits, 8 to a byte along the last axis, least significant first (`last_polarity`, section 5)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

# Byte i of eight, 0 or 1, times 2^(56 − 7i) puts its bit in place i of the highest byte; no two products meet.
_GATHER = sum(1 << (56 - 7 * i) for i in range(8))


@cache
def _signs(device: torch.device) -> Tensor:
    """Row k holds the eight signs in byte k: −1 where the bit is set, else 1; float32, (256, 8)."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return 1 - 2 * bits.float()


def pack(bits: Tensor) -> Tensor:
    """Packs along the last axis.

    Args:
        bits: uint8, 0 or 1, at least one axis.

    Returns:
        uint8, the last axis of length ⌈n / 8⌉, padded with zeros.
    """
    missing = -bits.shape[-1] % 8
    bits = pad(bits, (0, missing)) if missing else bits.contiguous()
    # The highest byte of a product may set the sign; what >> copies into the other bits is cut off.
    return (bits.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def updated(packed: Tensor, g: Tensor) -> Tensor:
    """The sign bits of g, the packed ones where g = 0.

    Args:
        packed: uint8, (arrays, *`automagic_core.polarity_shape`).
        g: finite float32, (arrays, *shape).
    """
    signs = g.view(*packed.shape[:-1], -1).sign().to(torch.int8).view(torch.uint8)
    # −1 is a byte of ones.
    return pack(signs >> 7) | (packed & ~pack(signs & 1))


def unpack_signs(packed: Tensor, length: int) -> Tensor:
    """Signs instead of bits: −1 where the bit is set, else 1.

    Args:
        packed: uint8 as `pack` gives it.
        length: of the last axis that was packed.

    Returns:
        float32, (*packed.shape[:-1], length).
    """
    signs = _signs(packed.device).index_select(0, packed.reshape(-1).int())
    return signs.view(*packed.shape[:-1], -1)[..., :length]
