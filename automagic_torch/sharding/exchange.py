"""Sums, maxima and gathers over the processes that hold an array.

Every process must call the same functions in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from automagic_torch.sharding.split import Split

# Newer versions of torch call it `all_gather_single` and warn about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def summed(parts: Sequence[Tensor], split: Split) -> list[Tensor]:
    """Sums float32 tensors over all pieces with one exchange; every process gets the same bits."""
    return _reduced(parts, split, dist.ReduceOp.SUM)


def largest(parts: Sequence[Tensor], split: Split) -> list[Tensor]:
    """Elementwise maxima of float32 tensors without NaN over all pieces, with one exchange."""
    return _reduced(parts, split, dist.ReduceOp.MAX)


def _reduced(parts: Sequence[Tensor], split: Split, operation: Any) -> list[Tensor]:
    if split.count == 1:
        return list(parts)
    together = torch.cat([part.reshape(-1) for part in parts])
    if together.numel():
        dist.all_reduce(together, operation, group=split.group)
    sizes = [part.numel() for part in parts]
    return [x.view(part.shape) for x, part in zip(torch.split(together, sizes), parts, strict=True)]


def gathered(x: Tensor, split: Split) -> Tensor:
    """Gathers whole stacked arrays from their pieces.

    Args:
        x: this process's pieces, (arrays, length of axis 0 here, ...).
        split: how each array is split.

    Returns:
        (arrays, length of axis 0, ...), the same in every process.
    """
    if split.count == 1:
        return x
    # `all_gather` needs pieces of one size.  The first piece is the longest.
    longest = split.borders[1]
    piece = x.new_zeros(longest, len(x), *x.shape[2:])
    piece[: x.shape[1]] = x.transpose(0, 1)
    every = x.new_empty(split.count * longest, *piece.shape[1:])
    _all_gather(every, piece, group=split.group)
    # Only the last pieces are shorter, so all padding is at the end.
    return every[: split.borders[-1]].transpose(0, 1).contiguous()
