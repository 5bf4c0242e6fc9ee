"""Gives an optimizer that version 0.1.0 pickled what the search of that version had not."""

from __future__ import annotations

from typing import Any

import torch

from automagic_core.arrays.group_keys import AGREEMENT, LAYOUT, LOG_RATE_SCALE, PEAK_AGREEMENT, SEARCH_KEYS, STEP
from automagic_torch.cameamp.groups import group_config, plan_of
from automagic_torch.sharding.extent_of import extent_of


def add_scalars(group: dict[str, Any]) -> None:
    """Adds the search's scalars that a group lacks.  A rate found so far is where the climb has ended."""
    for key in SEARCH_KEYS:
        group.setdefault(key, torch.full_like(group[LOG_RATE_SCALE], -1.0 if key == PEAK_AGREEMENT else 0.0))


def add_search(group: dict[str, Any], states: dict[Any, dict[str, Any]]) -> None:
    """Adds the search's scalars to a group, and `walk` to its arrays if the search goes on; it begins here.

    Args:
        group: with the keys of today.
        states: of all parameters; those of the group are replaced.
    """
    if AGREEMENT in group:
        return
    add_scalars(group)
    config = group_config(group)
    if not config.searches or group[STEP] >= config.warmup_steps:
        return
    for p in group["params"]:
        if "age" in states.get(p, {}) and "walk" not in states[p]:
            plan = plan_of(p, config, group[LAYOUT], eight_bit=True)
            states[p] = {**states[p], **extent_of(p, plan, None).zeros(("walk",), p.device)}
