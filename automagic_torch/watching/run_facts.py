"""What a monitor reads of a running optimizer: skipped steps, rates, devices, and losses on their way to the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from automagic_core.watching.suggestions import RunRates


def losses_to_host(losses: Sequence[Any]) -> list[float]:
    """Losses as floats, with one copy from each device.

    Args:
        losses: numbers, or tensors and arrays of one element, in any order of devices.

    Raises:
        ValueError: a loss that is not one number.
    """
    values = [0.0] * len(losses)
    by_device: dict[torch.device, list[int]] = {}
    for index, loss in enumerate(losses):
        if isinstance(loss, Tensor):
            by_device.setdefault(loss.device, []).append(index)
        else:
            values[index] = float(loss)
    for indices in by_device.values():
        # float64 does not exist on every device; a loss needs no more than float32 holds.
        stacked = torch.stack([check_loss(losses[index]).detach().reshape(()).float() for index in indices])
        for index, value in zip(indices, stacked.tolist(), strict=True):
            values[index] = value
    return values


def check_loss(loss: Tensor) -> Tensor:
    """Returns the loss; raises a ValueError unless it has one element."""
    if loss.numel() != 1:
        raise ValueError(f"a loss of shape {tuple(loss.shape)} is not one number; give its mean")
    return loss


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def devices(optimizer: Optimizer) -> set[torch.device]:
    """Where the parameters are."""
    return {p.device for p in parameters(optimizer)}


def run_rates(optimizer: Optimizer) -> RunRates:
    """The rates of the group that is fastest now."""
    return max((_group_rates(group) for group in optimizer.param_groups), key=lambda rates: rates.rate)


def _group_rates(group: Mapping[str, Any]) -> RunRates:
    lr = float(group["lr"])
    rate = 0.0 if lr == 0 else min(max(lr * math.exp(float(group["lr_scale"])), group["min_lr"]), group["max_lr"])
    searching = group["lr_mask_gain"] > 0 and group["step"] < group["warmup_steps"]
    return RunRates(lr, rate, group["min_lr"], group["max_lr"], searching)
