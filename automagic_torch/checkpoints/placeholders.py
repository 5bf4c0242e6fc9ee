"""A state dict as it is saved; a distributed one has zeros for the warm-up (docs/algorithm.md, section 6.3).

`torch.distributed.checkpoint` reads into the states of a fresh optimizer, and refuses a checkpoint that lacks one of
them.  A fresh optimizer has the states of the warm-up.  Loading drops them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from automagic_core.arrays.group_keys import LAYOUT, STEP
from automagic_core.arrays.state_forms import own_states
from automagic_torch.cameamp.groups import group_config, plan_of
from automagic_torch.codec.stored import state_forms
from automagic_torch.sharding.extent_of import extent_of


def as_saved(optimizer: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """What torch has put together, as it can be saved and loaded; a hook of torch's `state_dict`."""
    # A schedule computed with numpy writes numbers that `torch.load` refuses to read as weights alone.
    saved["param_groups"] = [{key: _as_number(value) for key, value in g.items()} for g in saved["param_groups"]]
    return _with_placeholders(saved, optimizer.param_groups, optimizer.state_device)


def _as_number(value: Any) -> Any:
    """The Python number for one of numpy's, an array of no dimensions included; anything else as it is."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


def _with_placeholders(
    state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]], state_device: torch.device | None
) -> dict[str, Any]:
    """The state dict with zeros for the states of the warm-up, where the warm-up is over.

    Without a process group the state dict is returned as it is.

    Args:
        state_dict: of an optimizer; its tensors are not copied.
        groups: the optimizer's groups.
        state_device: the device of its states.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return state_dict
    states = dict(state_dict["state"])
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        config = group_config(group)
        for p, key in zip(group["params"], saved["params"], strict=True):
            if config.warmup_steps == 0 or group[STEP] < config.warmup_steps or not own_states(states.get(key, {})):
                continue
            plan = plan_of(p, config, group[LAYOUT], eight_bit="exp_avg_absmax" in states[key])
            missing = [name for name in state_forms(plan, warming=True) if name not in states[key]]
            states[key] = states[key] | extent_of(p, plan, state_device).zeros(missing, p.device)
    return {**state_dict, "state": states}
