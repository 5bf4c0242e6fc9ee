"""What the monitor reads from an optimizer: losses, devices and rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from automagic_core.arrays.group_keys import LOG_RATE_SCALE, STEP
from automagic_core.watching.suggestions import RunRates
from automagic_torch.cameamp.groups import group_config


def losses_to_host(losses: Sequence[Any], names: Sequence[str] = ()) -> list[float]:
    """Copies losses to the host as floats, with one copy from each device.

    Args:
        losses: numbers, or tensors and arrays of one element, on any devices.
        names: what they are, for errors; without names all are losses.

    Raises:
        ValueError: a loss that is not one number.
    """
    values = [0.0] * len(losses)
    by_device: dict[torch.device, list[int]] = {}
    for index, loss in enumerate(losses):
        check_loss(loss, *names[index : index + 1])
        if isinstance(loss, Tensor):
            by_device.setdefault(loss.device, []).append(index)
        else:
            values[index] = float(np.asarray(loss).item())
    for indices in by_device.values():
        # float32, since not every device has float64.
        stacked = torch.stack([losses[index].detach().reshape(()).float() for index in indices])
        for index, value in zip(indices, stacked.tolist(), strict=True):
            values[index] = value
    return values


def check_loss(loss: Any, name: str = "loss") -> Any:
    """Returns the loss, or the scalar of another name; raises a ValueError unless it has one element."""
    shape = tuple(loss.shape) if isinstance(loss, Tensor) else np.shape(loss)
    if math.prod(shape) != 1:
        raise ValueError(f"{'a loss' if name == 'loss' else name} of shape {shape} is not one number; give its mean")
    return loss


def devices(optimizer: Optimizer) -> set[torch.device]:
    """The devices of the parameters."""
    return {p.device for group in optimizer.param_groups for p in group["params"]}


def run_rates(optimizer: Optimizer) -> RunRates:
    """The rates of the group whose rate is the highest now, among those that took a step if there are any."""
    began = [group for group in optimizer.param_groups if group[STEP] > 0]
    return max(map(_group_rates, began or optimizer.param_groups), key=lambda rates: rates.rate)


def _group_rates(group: Mapping[str, Any]) -> RunRates:
    lr, config = float(group["lr"]), group_config(group)
    found = lr * math.exp(float(group[LOG_RATE_SCALE]))
    rate = min(max(found, min(config.min_lr, lr)), max(config.max_lr, lr))
    searching = config.searches and group[STEP] < config.warmup_steps
    return RunRates(lr, rate, config.min_lr, config.max_lr, searching)
