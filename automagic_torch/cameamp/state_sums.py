"""Sums one scalar state over all arrays, without waiting for a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer


def state_sums(optimizer: Optimizer, name: str) -> list[Tensor]:
    """The sums of one 0-d state over all arrays, one tensor for each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for state in optimizer.state.values():
        # An entry that is no parameter's may be anything.
        if isinstance(state, Mapping) and name in state:
            by_device.setdefault(state[name].device, []).append(state[name])
    return [torch.stack(tensors).sum() for tensors in by_device.values()]


def count(sums: Iterable[Tensor]) -> int:
    """Adds up the result of `state_sums` on the host."""
    return sum(int(total) for total in sums)
