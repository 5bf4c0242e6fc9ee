"""What processes that share arrays tell each other: every process calls the same functions in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from automagic_torch.sharding.split import Split

# Newer versions of torch have another name for it, and warn of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def summed(parts: Sequence[Tensor], split: Split) -> list[Tensor]:
    """Sums over all pieces, of float32 tensors, with one exchange; the same bits in every process."""
    return _reduced(parts, split, dist.ReduceOp.SUM)


def largest(parts: Sequence[Tensor], split: Split) -> list[Tensor]:
    """Element-wise maxima over all pieces, of float32 tensors without NaN, with one exchange."""
    return _reduced(parts, split, dist.ReduceOp.MAX)


def _reduced(parts: Sequence[Tensor], split: Split, operation: Any) -> list[Tensor]:
    if split.count == 1:
        return list(parts)
    together = torch.cat([part.reshape(-1) for part in parts])
    if together.numel():
        dist.all_reduce(together, operation, group=split.group)
    sizes = [part.numel() for part in parts]
    return [x.view(part.shape) for x, part in zip(together.split(sizes), parts, strict=True)]


def gathered(x: Tensor, split: Split) -> Tensor:
    """Whole stacked arrays from their pieces.

    Args:
        x: this process's piece, (arrays, rows here, ...).
        split: of one array.

    Returns:
        (arrays, rows, ...), the same in every process.
    """
    if split.count == 1:
        return x
    # Pieces must be of one size to travel: the first is the longest.
    longest = split.borders[1]
    piece = x.new_zeros(longest, len(x), *x.shape[2:])
    piece[: x.shape[1]] = x.transpose(0, 1)
    every = x.new_empty(split.count * longest, *piece.shape[1:])
    _all_gather(every, piece, group=split.group)
    # What the last pieces lack stands at the end.
    return every[: split.borders[-1]].transpose(0, 1).contiguous()
