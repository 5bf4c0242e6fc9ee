"""Refuses saved numbers that no run can have written, as a damaged file has them.

``torch.load`` does not compare a file with the checksums in it, so a flipped bit arrives here as a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_core.value_limits import check_range, limits
from automagic_torch.states import SLOTS


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
