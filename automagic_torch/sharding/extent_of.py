"""Decides whether a parameter is whole in this process or in pieces over several."""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_core import StatePlan
from automagic_torch.arrays.dtensors import is_dtensor
from automagic_torch.sharding.extent import Extent


def extent_of(p: Tensor, plan: StatePlan, state_device: torch.device | None = None) -> Extent:
    """The extent of a parameter, and of others that are split in the same way.

    Args:
        p: the parameter.
        plan: plan of its states.
        state_device: the device of the states; None for that of the parameter.

    Raises:
        ValueError: the parameter is a DTensor with placements that are not supported.
    """
    if not is_dtensor(p):
        return Extent(plan, state_device)
    from automagic_torch.sharding.sharded_extent import ShardedExtent
    from automagic_torch.sharding.split import split_of

    return ShardedExtent(plan, split_of(p), state_device)
