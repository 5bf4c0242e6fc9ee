"""The history of stage 1 in a parameter group: there while the group's `percentile_clipping` is below 100."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from automagic_core import Config
from automagic_core.constants import NORM_HISTORY
from automagic_torch.saved_values import check_values

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


def check_norm_history(group: Mapping[str, Any], config: Config, name: str) -> None:
    """Raises a ValueError unless a saved group holds what its fields plan.

    Args:
        group: as it was saved.
        config: its hyperparameters.
        name: how the message calls the group.
    """
    planned = config.clips_by_percentile
    for key in (HISTORY, POSITION):
        if (key in group) != planned:
            there = "has a" if key in group else "lacks"
            raise ValueError(f"{name} {there} {key} with percentile_clipping = {config.percentile_clipping}")
    if not planned:
        return
    history, position = group[HISTORY], group[POSITION]
    if not _is(history, (NORM_HISTORY,), torch.float32):
        raise ValueError(
            f"{name} has norm_history {_form(history)}; valid: a float32 tensor of shape ({NORM_HISTORY},)"
        )
    check_values(history, HISTORY, name)
    if not _is(position, (), torch.int32) or not 0 <= int(position) < NORM_HISTORY:
        raise ValueError(
            f"{name} has norm_position = {position!r}; valid: an int32 scalar tensor in [0, {NORM_HISTORY - 1}]"
        )


def _is(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and (tuple(value.shape), value.dtype, value.layout) == (
        shape,
        dtype,
        torch.strided,
    )


def _form(value: Any) -> str:
    return f"of shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else f"= {value!r}"
