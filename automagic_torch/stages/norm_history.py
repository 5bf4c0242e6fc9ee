"""The ring of gradient norms that stage 1 keeps in a parameter group (docs/algorithm.md, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from automagic_core import Config
from automagic_core.arrays.group_keys import group_key
from automagic_core.config.constants import NORM_HISTORY

HISTORY, POSITION = map(group_key, ("norm_history", "norm_position"))


def add_norm_history(group: dict[str, Any], config: Config, device: torch.device) -> None:
    """Gives a group without steps an empty history if its fields need one; else removes the history."""
    if not config.clips_by_percentile:
        group.pop(HISTORY, None)
        group.pop(POSITION, None)
    elif HISTORY not in group:
        group[HISTORY] = torch.zeros(NORM_HISTORY, dtype=torch.float32, device=device)
        group[POSITION] = torch.zeros((), dtype=torch.int32, device=device)


def has_norm_history(group: Mapping[str, Any]) -> bool:
    """Whether the group has a history."""
    return HISTORY in group and POSITION in group
