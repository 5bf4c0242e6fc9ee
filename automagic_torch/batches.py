"""Which arrays are computed with as one."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from automagic_torch.call import Batch
from automagic_torch.groups import is_embedding, is_lora

ARRAY_LIMIT = {"cpu": 2**15, "other": 2**20}
BATCH_LIMIT = 2**23 - 2**16


def kind(p: Tensor) -> Hashable:
    """What the arrays of one group must have in common to be in one batch; p has a gradient."""
    assert p.grad is not None
    return p.shape, p.dtype, p.grad.dtype, p.device, is_embedding(p), is_lora(p)


def arrays_in_batch(size: int, device: torch.device) -> int:
    """How many arrays of `size` elements a batch takes, at least 1."""
    largest = ARRAY_LIMIT["cpu" if device.type == "cpu" else "other"]
    return 1 if size > largest else max(1, BATCH_LIMIT // size)


def has_room(batch: Batch) -> bool:
    """Whether the batch takes another array."""
    return len(batch.params) < arrays_in_batch(batch.plan.size, batch.params[0].device)
