"""`last_polarity` of shards (section 5).

The bits of an array of two or more axes are packed within its rows, so a shard packs its own.  An array of one axis is
cut between bytes only by chance: else all processes keep all of its bits.
"""

from __future__ import annotations

from torch import Tensor

from automagic_torch.codec import polarity
from automagic_torch.sharding.exchange import gathered
from automagic_torch.sharding.split import Split


def signs_here(packed: Tensor, g: Tensor, split: Split, is_split: bool) -> Tensor:
    """−1 or 1 for every element of the piece.

    Args:
        packed: what this process keeps of the bits, stacked.
        g: the pieces, stacked.
        split: of the arrays.
        is_split: the bits are split as the arrays.
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
