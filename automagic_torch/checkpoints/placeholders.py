"""What only a warm-up needs, as zeros, in what several processes save after it (section 6).

`torch.distributed.checkpoint` reads into the states of a fresh optimizer and refuses a checkpoint that lacks one of
them.  A fresh optimizer is warming up, so a checkpoint needs the states of the warm-up when it is over, too.  Loading
drops them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from automagic_torch.cameamp.groups import group_config, plan_of
from automagic_torch.codec.stored import state_forms
from automagic_torch.sharding.extent_of import extent_of


def with_placeholders(
    state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]], state_device: torch.device | None
) -> dict[str, Any]:
    """A state dict in which every array whose warm-up is over has zeros for what only a warm-up needs.

    As it is where no process group has been initialized: one process alone saves what there is.

    Args:
        state_dict: of an optimizer; its tensors are taken over, not copied.
        groups: the optimizer's.
        state_device: where it keeps its states.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return state_dict
    states = dict(state_dict["state"])
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        config = group_config(group)
        for p, key in zip(group["params"], saved["params"], strict=True):
            if config.warmup_steps == 0 or group["step"] < config.warmup_steps or not states.get(key):
                continue
            plan = plan_of(p, config, group["layout"], eight_bit="exp_avg_absmax" in states[key])
            missing = [name for name in state_forms(plan, warming=True) if name not in states[key]]
            states[key] = states[key] | extent_of(p, plan, state_device).zeros(missing, p.device)
    return {**state_dict, "state": states}
