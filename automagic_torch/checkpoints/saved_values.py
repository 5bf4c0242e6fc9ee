"""Refuses saved numbers that no run can have written, as a damaged file has them.

``torch.load`` does not compare a file with the checksums in it, so a flipped bit arrives here as a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from automagic_core import Config
from automagic_core.config.constants import NORM_HISTORY
from automagic_core.moving.value_limits import check_range, limits
from automagic_torch.codec.stored import SLOTS
from automagic_torch.stages.norm_history import HISTORY, POSITION


def check_values(values: Tensor, key: str, owner: str) -> None:
    """Raises a ValueError that names the state if a value lies outside its range or is NaN.  Waits for the device.

    Args:
        values: of the shape and dtype that the state has.
        key: the state's name.
        owner: whose state it is, for the message.
    """
    is_code = key in SLOTS and values.dtype == torch.uint8
    if limits(key) is None or is_code or values.numel() == 0 or values.is_meta:
        return
    least, largest = (float(value) for value in torch.aminmax(values))
    check_range(least, largest, key, owner)


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
