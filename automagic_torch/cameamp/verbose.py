"""`verbose=True` logs a line when a run starts, every 100 steps, and when a group's search ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from automagic_core.arrays.group_keys import LOG_RATE_SCALE, PEAK_AGREEMENT, STEP, group_key
from automagic_core.watching.verbose import EVERY, progress_message, search_message, start_message, tell
from automagic_torch.arrays.marks import is_embedding, is_lora
from automagic_torch.cameamp.groups import group_config
from automagic_torch.cameamp.learning_rate import rates
from automagic_torch.cameamp.state_sums import count, state_sums

LOGGER = "automagic_torch"

_told: WeakSet[Any] = WeakSet()
"""Optimizers whose start was logged.  This is no attribute of theirs, since a copy would inherit it."""


def tell_step(optimizer: Any) -> None:
    """Logs what is due after a step, if a group has `verbose` on.

    It waits for the device once in 100 steps and at the end of a search, to read the rate.

    Args:
        optimizer: an `AutomagicCameAMP8bit` that has just stepped.
    """
    groups = [group for group in optimizer.param_groups if group[group_key("verbose")]]
    begun = [group for group in groups if group[STEP] > 0]
    if not begun:
        return
    if optimizer not in _told:
        _told.add(optimizer)
        tell(LOGGER, _start(optimizer, groups))
    if max(group[STEP] for group in begun) % EVERY == 0:
        tell(LOGGER, _progress(optimizer, begun))
    for group in begun:
        config = group_config(group)
        if config.searches and group[STEP] == config.warmup_steps:
            peak = float(group[PEAK_AGREEMENT]) if config.climbs else None
            tell(LOGGER, search_message(group[STEP], _rate(group), config.max_lr, peak))


def _start(optimizer: Any, groups: list[dict[str, Any]]) -> str:
    parameters: list[Tensor] = [p for group in groups for p in group["params"]]
    devices = ", ".join(sorted({_device_name(p.device) for p in parameters}))
    lora, embeddings = sum(map(is_lora, parameters)), sum(map(is_embedding, parameters))
    report = optimizer.get_memory_efficiency_report()
    return start_message(group_config(groups[0]), report, lora, embeddings, devices)


def _progress(optimizer: Any, groups: list[dict[str, Any]]) -> str:
    fastest = max(groups, key=_rate)
    skipped = count(state_sums(optimizer, "skipped_steps"))
    step = max(group[STEP] for group in groups)
    return progress_message(step, _rate(fastest), float(fastest[LOG_RATE_SCALE].exp()), skipped)


def _rate(group: Mapping[str, Any]) -> float:
    """η̂, the rate of the group's arrays."""
    scale: Tensor = group[LOG_RATE_SCALE]
    return float(rates(group["lr"], scale, group[STEP], group_config(group), scale.device).array)


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
