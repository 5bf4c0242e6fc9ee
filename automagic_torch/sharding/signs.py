"""Packs and unpacks `last_polarity`, the sign bits, for pieces of arrays (docs/algorithm.md, section 9.1).

Bits are packed along the last axis.  So each process packs its own piece of an array with two or more axes.  An array
with one axis may be cut within a byte, and all processes then keep all of its bits.
"""

from __future__ import annotations

from torch import Tensor

from automagic_torch.codec import polarity
from automagic_torch.sharding.exchange import gathered
from automagic_torch.sharding.split import Split


def signs_here(packed: Tensor, g: Tensor, split: Split, is_split: bool) -> Tensor:
    """−1 or 1 for every element of the piece.

    Args:
        packed: the bits that this process keeps, stacked.
        g: the pieces, stacked.
        split: how the arrays are split.
        is_split: the bits are split like the arrays.
    """
    if g.numel() == 0:
        return g
    if is_split or split.dim is None:
        return polarity.unpack_signs(packed, g.shape[-1] if g.ndim > 1 else 1).view_as(g)
    return split.piece(polarity.unpack_signs(packed, split.shape[0]), axis=1)


def updated(packed: Tensor, g: Tensor, split: Split, is_split: bool) -> Tensor:
    """The bits after g; arguments as for `signs_here`."""
    if not is_split and split.count > 1:
        g = gathered(g, split)
    return polarity.updated(packed, g) if packed.numel() else packed
