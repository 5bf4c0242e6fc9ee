"""The rate in force: η̂ of a group's last step, for those who log it (docs/algorithm.md, section 5.6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from automagic_core.arrays.group_keys import EFFECTIVE_LR, LOG_RATE_SCALE, STEP
from automagic_torch.arrays.stacked import to_device
from automagic_torch.cameamp.groups import group_config
from automagic_torch.cameamp.learning_rate import rates


def formed_rate(group: Mapping[str, Any], step: int) -> Tensor:
    """η̂ with the group's present `lr` and ℓ at some step, 0-d float32 on the device of ℓ."""
    ell: Tensor = group[LOG_RATE_SCALE]
    return rates(group["lr"], ell, step, group_config(group), ell.device).array


def rate_in_force(group: Mapping[str, Any]) -> Tensor:
    """η̂ of the group's last step; before the first step that of the first.  0-d float32; does not wait."""
    return kept_rate(group) if group[STEP] > 0 else formed_rate(group, 1)


def kept_rate(group: Mapping[str, Any]) -> Tensor:
    """What the group holds as its rate; formed anew where that is none, as in what earlier versions saved."""
    held = group.get(EFFECTIVE_LR)
    if isinstance(held, Tensor) and held.shape == () and held.dtype == torch.float32:
        return held
    return formed_rate(group, max(group[STEP], 1))


def learning_rates(groups: Sequence[Mapping[str, Any]]) -> list[float]:
    """The rate in force of every group.  Waits once for the device of the first group's rate."""
    found = [rate_in_force(group) for group in groups]
    together = torch.stack([to_device(rate, found[0].device) for rate in found])
    listed: list[float] = together.tolist()
    return listed
