"""Chooses how a parameter is held: as a whole here, or in pieces by several processes."""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_core import StatePlan
from automagic_torch.arrays.dtensors import is_dtensor
from automagic_torch.sharding.extent import Extent


def extent_of(p: Tensor, plan: StatePlan, state_device: torch.device | None = None) -> Extent:
    """What this process holds of a parameter, and of others that are spread alike.

    Args:
        p: the parameter.
        plan: of its states.
        state_device: where states are kept; None, with the parameter.

    Raises:
        ValueError: it is a DTensor with placements that are not supported.
    """
    if not is_dtensor(p):
        return Extent(plan, state_device)
    from automagic_torch.sharding.sharded_extent import ShardedExtent
    from automagic_torch.sharding.split import split_of

    return ShardedExtent(plan, split_of(p), state_device)  # type: ignore[arg-type]  # it is a DTensor
