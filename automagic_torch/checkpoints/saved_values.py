"""Rejects saved values that no run can have written (docs/algorithm.md, section 6.4).

``torch.load`` does not compare a file with its checksums, so a damaged file may hold any numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from automagic_core import Config
from automagic_core.arrays.group_keys import PREFIX
from automagic_core.arrays.state_forms import SLOTS, moment_of
from automagic_core.config.constants import NORM_HISTORY
from automagic_core.moving.value_limits import check_range, limits
from automagic_torch.arrays.dtensors import is_dtensor
from automagic_torch.stages.norm_history import HISTORY, POSITION


def check_values(values: Tensor, key: str, owner: str) -> None:
    """Raises a ValueError that names the state if a value lies outside its range or is NaN.  Waits for the device.

    Args:
        values: the state, in its right shape and dtype.
        key: the state's name.
        owner: the parameter or group in the message.
    """
    is_code = moment_of(key) in SLOTS and values.dtype == torch.uint8
    if limits(key) is None or is_code or values.numel() == 0 or values.is_meta:
        return
    least, largest = (float(value) for value in torch.aminmax(values))
    check_range(least, largest, key, owner)


def refuse_codes(exp_avg: Any, update_clip: float, name: str) -> None:
    """Raises a ValueError if a momentum of 32 bits holds codes.  Waits for the device.

    ``torch.distributed.checkpoint.load`` casts what was saved to the dtype that is there, without a word.

    Args:
        exp_avg: of one array; anything but a dense tensor of float32 is for others to check.
        update_clip: no momentum is larger.
        name: of the parameter.
    """
    if not isinstance(exp_avg, Tensor) or exp_avg.dtype != torch.float32 or exp_avg.layout != torch.strided:
        return
    part = exp_avg.to_local() if is_dtensor(exp_avg) else exp_avg
    if part.numel() == 0 or part.is_meta or not float(part.max()) > update_clip:
        return
    if bool(((part == part.round()) & (part >= 0) & (part <= 255)).all()):
        raise ValueError(
            f"the saved state of {name} has codes of 8 bits in place of its momentum: torch.distributed.checkpoint put "
            "them into an optimizer of 32 bits; load into one with the fields of the run, then use load_requantized"
        )


def check_norm_history(group: Mapping[str, Any], config: Config, name: str) -> None:
    """Raises a ValueError unless a saved group has a valid history of norms, or none if its fields need none.

    Args:
        group: the saved group.
        config: its hyperparameters.
        name: the group in the message.
    """
    planned = config.clips_by_percentile
    for key in (HISTORY, POSITION):
        if (key in group) != planned:
            there = "has a" if key in group else "lacks"
            raise ValueError(
                f"{name} {there} {key.removeprefix(PREFIX)} with percentile_clipping = {config.percentile_clipping}"
            )
    if not planned:
        return
    history, position = group[HISTORY], group[POSITION]
    if not _is(history, (NORM_HISTORY,), torch.float32):
        raise ValueError(
            f"{name} has norm_history {_form(history)}; valid: a float32 tensor of shape ({NORM_HISTORY},)"
        )
    check_values(history, HISTORY.removeprefix(PREFIX), name)
    if not _is(position, (), torch.int32) or not 0 <= int(position) < NORM_HISTORY:
        raise ValueError(
            f"{name} has norm_position = {position!r}; valid: an int32 scalar tensor in [0, {NORM_HISTORY - 1}]"
        )


def _is(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided
    return is_dense and (tuple(value.shape), value.dtype) == (shape, dtype)


def _form(value: Any) -> str:
    return f"of shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else f"= {value!r}"
