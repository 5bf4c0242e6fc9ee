"""Packs and unpacks `last_polarity`, the sign bits of the last gradient (docs/algorithm.md, sections 5.8 and 6.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from automagic_torch.codec.kept_tensors import kept_tensor

# Byte i of eight is 0 or 1.  The factor 2^(56 − 7i) moves it to bit i of the highest byte; no two products overlap.
_GATHER = sum(1 << (56 - 7 * i) for i in range(8))


@kept_tensor
def _signs(device: torch.device) -> Tensor:
    """Row k holds the eight signs of byte k, −1 where the bit is set, else 1: float32, (256, 8)."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return 1 - 2 * bits.float()


def pack(bits: Tensor) -> Tensor:
    """Packs bits along the last axis, least significant bit first.

    Args:
        bits: uint8, 0 or 1, at least one axis.

    Returns:
        uint8, the last axis of length ⌈n / 8⌉, padded with zeros.
    """
    missing = -bits.shape[-1] % 8
    bits = pad(bits, (0, missing)) if missing else bits.contiguous()
    # >> copies the sign bit into higher bits; the conversion to uint8 drops them.
    return (bits.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def updated(packed: Tensor, g: Tensor) -> Tensor:
    """The sign bits of g; where g = 0, the packed ones stay.

    Args:
        packed: uint8, (arrays, *`automagic_core.polarity_shape`).
        g: finite float32, (arrays, *shape).
    """
    g = g.view(*packed.shape[:-1], -1)
    if torch.compiler.is_compiling():  # a compiler does not fuse views of other widths
        missing = -g.shape[-1] % 8
        eights = (pad(g, (0, missing)) if missing else g).view(*packed.shape, 8)
        negative = sum(torch.where(eights[..., i] < 0, 1 << i, 0) for i in range(8))
        nonzero = sum(torch.where(eights[..., i] != 0, 1 << i, 0) for i in range(8))
        return (negative | (packed & ~nonzero)).to(torch.uint8)
    signs = g.sign().to(torch.int8).view(torch.uint8)
    # −1 is a byte of ones, so >> 7 gives 1 for negative elements.
    return pack(signs >> 7) | (packed & ~pack(signs & 1))


def unpack_signs(packed: Tensor, length: int) -> Tensor:
    """Unpacks bits as signs: −1 where the bit is set, else 1.

    Args:
        packed: uint8, as `pack` returns it.
        length: length of the last axis before packing.

    Returns:
        float32, (*packed.shape[:-1], length).
    """
    if torch.compiler.is_compiling():
        bits = (packed[..., None].int() >> torch.arange(8, dtype=torch.int32, device=packed.device)) & 1
        signs = (1 - 2 * bits).float()
        if packed.device.type == "cpu":  # kept in memory, since the loop that reads them would not be vector code
            signs = signs.as_strided(signs.shape, signs.stride())
        return signs.view(*packed.shape[:-1], -1)[..., :length]
    signs = _signs(packed.device).index_select(0, packed.reshape(-1).int())
    return signs.view(*packed.shape[:-1], -1)[..., :length]
