"""Brings an optimizer that an earlier version pickled into today's form."""

from __future__ import annotations

from typing import Any

import torch

from automagic_core import Config, StatePlan
from automagic_core.arrays.group_keys import AGREEMENT, LAYOUT, LOG_RATE_SCALE, PEAK_AGREEMENT, SEARCH_KEYS, STEP
from automagic_core.arrays.state_forms import foreign_states, own_states
from automagic_core.moving.earlier_forms import in_todays_form
from automagic_torch.arrays.dtensors import whole
from automagic_torch.cameamp.groups import group_config, plan_of
from automagic_torch.codec.stored import States
from automagic_torch.sharding.extent_of import extent_of


def add_scalars(group: dict[str, Any]) -> None:
    """Adds the search's scalars that a group lacks.  A rate found so far is where the climb has ended."""
    for key in SEARCH_KEYS:
        group.setdefault(key, torch.full_like(group[LOG_RATE_SCALE], -1.0 if key == PEAK_AGREEMENT else 0.0))


def with_todays_forms(state: States, plan: StatePlan, config: Config, warming: bool) -> States:
    """`automagic_core.moving.earlier_forms.in_todays_form` for tensors; a DTensor that changes becomes whole."""
    return in_todays_form(
        state,
        plan,
        config,
        warming,
        to_numpy=lambda x: whole(x).detach().cpu().numpy(),
        from_numpy=torch.from_numpy,
    )


def add_forms(group: dict[str, Any], states: dict[Any, dict[str, Any]]) -> None:
    """Brings the states of a group's arrays into today's forms."""
    config = group_config(group)
    for p in group["params"]:
        own = own_states(states.get(p, {}))
        if own:
            plan = plan_of(p, config, group[LAYOUT], eight_bit="exp_avg_absmax" in own)
            now = with_todays_forms(own, plan, config, group[STEP] < config.warmup_steps)
            if now.keys() != own.keys():  # no two forms have the same names
                there = own["age"].device
                extent = extent_of(p, plan, None if there == p.device else there)
                now = {name: x if x is own.get(name) else extent.placed(name, x, p.device) for name, x in now.items()}
                states[p] = foreign_states(states[p]) | now


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
