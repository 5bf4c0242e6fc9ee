"""The call in which only the states are made.

`torch.distributed.checkpoint` asks a fresh optimizer for its states by a step with a rate of 0 and zeros for gradients,
before it loads or saves.  Counted as a step it would stay in the run: in t, in every array's age and in the averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from automagic_torch.cameamp.call import Call


def is_rehearsal(calls: Sequence[Call]) -> bool:
    """Whether no group has taken a step, every rate is 0 and every gradient zero, in all processes.

    It looks at gradients, and waits for them, only in a first step with a rate of 0.
    """
    if not calls or any(call.group["step"] > 0 or not _is_zero(call.group["lr"]) for call in calls):
        return False
    batches = [batch for call in calls for batch in call.batches]
    if not batches:
        return False
    found = any(bool(batch.raw_gradients().any()) for batch in batches if not batch.extent.spread)
    if any(batch.extent.spread for batch in batches):
        from automagic_torch.cameamp.agreement import any_gradient

        # Asked in every process, whatever it found alone.
        found |= any_gradient(batches)
    return not found


def _is_zero(lr: Any) -> bool:
    # A rate on a device would have to be waited for; the checkpoint's are numbers or on the host.
    return (not isinstance(lr, Tensor) or lr.device.type == "cpu") and bool(torch.as_tensor(lr) == 0)
