"""Detects the empty call by which `torch.distributed.checkpoint` makes states, so that it does not count as a step.

The call has a rate of 0 and zeros for gradients (docs/algorithm.md, section 6.3).  As a step it would change t, ages
and averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from automagic_core.arrays.group_keys import STEP
from automagic_torch.cameamp.call import Call


def is_rehearsal(calls: Sequence[Call]) -> bool:
    """Whether no group has taken a step, every rate is 0, and every gradient is zero in all processes.

    It reads gradients, and so waits for the device, only before the first step and with a rate of 0.
    """
    if not calls or any(call.group[STEP] > 0 or not _is_zero(call.group["lr"]) for call in calls):
        return False
    batches = [batch for call in calls for batch in call.batches]
    if not batches:
        return False
    found = any(bool(batch.raw_gradients().any()) for batch in batches if not batch.extent.spread)
    if any(batch.extent.spread for batch in batches):
        from automagic_torch.cameamp.agreement import any_gradient

        # Every process must take part, whatever it found alone.
        found |= any_gradient(batches)
    return not found


def _is_zero(lr: Any) -> bool:
    # The rates in such a call are numbers or on the host.  A rate on another device is not read.
    if not isinstance(lr, Tensor):
        return bool(lr == 0)
    return lr.device.type == "cpu" and not lr.any()
