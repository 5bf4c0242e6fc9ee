"""The rate in force, η̂ of a group's last step, and what raises it unasked (docs/algorithm.md, section 5.6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from automagic_core.arrays.group_keys import EFFECTIVE_LR, LOG_RATE_SCALE, STEP
from automagic_torch.arrays.stacked import to_device
from automagic_torch.cameamp.groups import group_config
from automagic_torch.cameamp.learning_rate import rates

FAR = 2.0
"""A rise by more than this is told.  Schedules that begin anew come back to where they were."""


def formed_rate(group: Mapping[str, Any], step: int) -> Tensor:
    """η̂ with the group's present `lr` and ℓ at some step, 0-d float32 on the device of ℓ."""
    ell: Tensor = group[LOG_RATE_SCALE]
    return rates(group["lr"], ell, step, group_config(group), ell.device).array


def rate_in_force(group: Mapping[str, Any]) -> Tensor:
    """η̂ of the group's last step; before the first step that of the first.  0-d float32; does not wait."""
    return kept_rate(group) if group[STEP] > 0 else formed_rate(group, 1)


def kept_rate(group: Mapping[str, Any]) -> Tensor:
    """What the group holds as its rate; formed anew where that is none, as in what earlier versions saved."""
    held = group.get(EFFECTIVE_LR)
    if isinstance(held, Tensor) and held.shape == () and held.dtype == torch.float32:
        return held
    return formed_rate(group, max(group[STEP], 1))


def learning_rates(groups: Sequence[Mapping[str, Any]]) -> list[float]:
    """The rate in force of every group.  Waits once for the device of the first group's rate."""
    found = [rate_in_force(group) for group in groups]
    together = torch.stack([to_device(rate, found[0].device) for rate in found])
    listed: list[float] = together.tolist()
    return listed


class HighestRates:
    """The highest `lr` that each group has had, as far as it is known without waiting for a device."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._highest = {id(group): _lr(group) for group in groups}

    def risen(self, index: int, group: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """A name and a sentence if a group's `lr` is far above what it was, and a search has found its factor.

        Args:
            index: of the group.
            group: before a step.
        """
        lr, before = _lr(group), self._highest.get(id(group), 0.0)
        self._highest[id(group)] = max(lr, before)
        if not 0 < FAR * before < lr:
            return
        config = group_config(group)
        if config.searches and group[STEP] >= config.warmup_steps:
            yield (
                "risen",
                f"group {index}: its lr rose from {before:g} to {lr:g} after the search; the rate in force is lr times "
                "the factor that was found, so it rises as much",
            )


def _lr(group: Mapping[str, Any]) -> float:
    rates = [group["lr"], group.get("initial_lr", 0.0)]
    return max(0.0 if isinstance(rate, Tensor) else float(rate) for rate in rates)
