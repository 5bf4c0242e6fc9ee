"""`analyze_memory_usage` for a torch optimizer."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from automagic_core.watching.memory_table import HeldStates, memory_table
from automagic_torch.cameamp.groups import can_store_8bit, group_config
from automagic_torch.codec import quantized_tensor as codec

_PARTS = ("_absmax", "_row", "_col")


def analyze_memory_usage(optimizer: Any, show: bool = False) -> str:
    """A table of what an optimizer's states hold, against Adam's, with a verdict.

    Below 30 % of parameters with 8-bit states the verdict warns, above 80 % it praises; where no state could be in
    8 bits, or where there is none yet, it says so instead.

    Args:
        optimizer: an `AutomagicCameAMP8bit`.
        show: print the table too.

    Returns:
        The table as plain text.
    """
    table = memory_table(held_states(optimizer))
    if show:
        print(table)
    return table


def held_states(optimizer: Any) -> HeldStates:
    """What the optimizer holds, counted from its tensors; DTensors count as wholes, whoever holds them."""
    eight = thirty_two = without = 0
    by_name: Counter[str] = Counter()
    for group in optimizer.param_groups:
        by_name.update(_shared(group))
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if not state:
                without += p.numel()
            elif "exp_avg_absmax" in state:
                eight += p.numel()
            else:
                thirty_two += p.numel()
            for name, tensor in state.items():
                by_name[_state_name(name)] += _bytes(tensor)
    return HeldStates(eight, thirty_two, without, dict(by_name), _kept_in_32(optimizer))


def _shared(group: dict[str, Any]) -> dict[str, int]:
    # Fields may be tensors too (a rate, say); they are no states.
    return {name: _bytes(group[name]) for name in ("lr_scale", "norm_history", "norm_position") if name in group}


def _kept_in_32(optimizer: Any) -> str | None:
    configs = [group_config(group) for group in optimizer.param_groups]
    if all(config.optim_bits == 32 for config in configs):
        return "optim_bits=32 asks for it"
    if not codec.BITSANDBYTES_AVAILABLE:
        return "bitsandbytes is not installed"
    groups = zip(optimizer.param_groups, configs, strict=True)
    if not any(c.optim_bits == 8 and can_store_8bit(p, c) for group, c in groups for p in group["params"]):
        return "outside CUDA states go to 8 bits only with force_8bit=True"
    return None


def _state_name(name: str) -> str:
    for part in _PARTS:
        name = name.removesuffix(part)
    return name


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
