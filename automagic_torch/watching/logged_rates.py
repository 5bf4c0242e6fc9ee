"""The rates in force under the names that loggers get."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from automagic_core.arrays.group_keys import EFFECTIVE_LR
from automagic_torch.arrays.stacked import to_device
from automagic_torch.cameamp.effective_rate import rate_in_force
from automagic_torch.watching.own_optimizer import own_optimizer


def logged_rates(optimizers: Iterable[Any]) -> dict[str, Tensor]:
    """The rates in force, 0-d float32; nothing waits for a device.

    Args:
        optimizers: optimizers or wrappers of them; those that are not this package's are left out.

    Returns:
        ``effective_lr``, the mean over the groups, and where there are several ``effective_lr/<number>`` for each.
        Groups without parameters are left out: the Trainer makes them.  Empty without an optimizer of this package.
    """
    groups = [group for optimizer in optimizers for group in _groups(optimizer) if group["params"]]
    found = [rate_in_force(group) for group in groups]
    if not found:
        return {}
    if len(found) == 1:
        return {EFFECTIVE_LR: found[0]}
    mean = torch.stack([to_device(rate, found[0].device) for rate in found]).mean()
    return {EFFECTIVE_LR: mean} | {f"{EFFECTIVE_LR}/{index}": rate for index, rate in enumerate(found)}


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    try:
        groups: list[dict[str, Any]] = own_optimizer(optimizer).param_groups
    except TypeError:
        return []
    return groups
