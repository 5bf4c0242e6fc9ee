"""Sign bits, 8 to a byte along the last axis, least significant first (`last_polarity`, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def pack(bits: Tensor) -> Tensor:
    """bool of any shape → uint8 of shape `automagic_core.polarity_shape`, padded with zeros; a scalar gives (1,)."""
    bits = bits.reshape(1) if bits.ndim == 0 else bits
    bits = pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8))
    by_byte = bits.reshape(*bits.shape[:-1], -1, 8) << _places(bits.device)
    return by_byte.sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack` → bool of the given shape."""
    bits = (packed[..., None] >> _places(packed.device)) & 1
    length = shape[-1] if shape else 1
    return bits.flatten(-2)[..., :length].reshape(shape).bool()
