"""The history of stage 1 in a parameter group: there while the group's `percentile_clipping` is below 100."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from automagic_core import Config
from automagic_core.config.constants import NORM_HISTORY

HISTORY, POSITION = "norm_history", "norm_position"


def add_norm_history(group: dict[str, Any], config: Config, device: torch.device) -> None:
    """Gives a group that has taken no step what its fields plan: an empty history, or none."""
    if not config.clips_by_percentile:
        group.pop(HISTORY, None)
        group.pop(POSITION, None)
    elif HISTORY not in group:
        group[HISTORY] = torch.zeros(NORM_HISTORY, dtype=torch.float32, device=device)
        group[POSITION] = torch.zeros((), dtype=torch.int32, device=device)


def has_norm_history(group: Mapping[str, Any]) -> bool:
    """Whether the group holds both."""
    return HISTORY in group and POSITION in group
