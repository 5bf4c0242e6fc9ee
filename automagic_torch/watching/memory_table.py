"""`analyze_memory_usage`: a table of what a torch optimizer's states hold."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from automagic_core.arrays.group_keys import OWN_KEYS
from automagic_core.arrays.state_forms import SHARED_STATES, moment_of, own_states
from automagic_core.watching.memory import ArrayMemory, memory_report
from automagic_core.watching.memory_table import HeldStates, memory_table
from automagic_torch.cameamp.groups import can_store_8bit, group_config
from automagic_torch.codec import quantized_tensor
from automagic_torch.watching.own_optimizer import own_optimizer


def analyze_memory_usage(optimizer: Any, show: bool = False) -> str:
    """Compares what an optimizer's states hold with Adam's, in a table with a verdict.

    The verdict warns if less than 30 % of the parameters have 8-bit states and praises if more than 80 % do.  It also
    says if no state could have 8 bits, and if there are no states yet.

    Args:
        optimizer: an `AutomagicCameAMP8bit`.
        show: print the table too.

    Returns:
        The table as plain text.

    Raises:
        TypeError: another optimizer.
    """
    table = memory_table(held_states(own_optimizer(optimizer)))
    if show:
        print(table)
    return table


def held_states(optimizer: Any) -> HeldStates:
    """Counts what the optimizer holds, from its tensors; DTensors count with their whole size."""
    eight = thirty_two = without = 0
    by_name: Counter[str] = Counter()
    for group in optimizer.param_groups:
        # The group's fields may be tensors too (a rate, for example), but they are no states.
        by_name.update({name: group[OWN_KEYS[name]].nbytes for name in SHARED_STATES if OWN_KEYS[name] in group})
        for p in dict.fromkeys(group["params"]):
            state = own_states(optimizer.state.get(p, {}))
            if not state:
                without += _size(p)
            elif "exp_avg_absmax" in state:
                eight += _size(p)
            else:
                thirty_two += _size(p)
            for name, tensor in state.items():
                by_name[moment_of(name)] += tensor.nbytes
    return HeldStates(eight, thirty_two, without, dict(by_name), _kept_in_32(optimizer))


def efficiency_report(optimizer: Any) -> dict[str, Any]:
    """`automagic_core.memory_report` of all states, and `bitsandbytes_available`."""
    everything = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
    held = {p: own_states(optimizer.state.get(p, {})) for p in everything}
    memory = [
        ArrayMemory(_size(p), "exp_avg_absmax" in state, sum(tensor.nbytes for tensor in state.values()))
        for p, state in held.items()
        if p.requires_grad or state
    ]
    keys = [OWN_KEYS[name] for name in SHARED_STATES]
    shared = sum(group[key].nbytes for group in optimizer.param_groups for key in keys if key in group)
    return memory_report(memory, shared) | {"bitsandbytes_available": quantized_tensor.BITSANDBYTES_AVAILABLE}


def _size(p: Tensor) -> int:
    """The number of elements; 0 for a parameter of a lazy module that was not called yet."""
    return 0 if is_lazy(p) else p.numel()


def _kept_in_32(optimizer: Any) -> str | None:
    configs = [group_config(group) for group in optimizer.param_groups]
    if all(config.optim_bits == 32 for config in configs):
        return "optim_bits=32 asks for it"
    if not quantized_tensor.BITSANDBYTES_AVAILABLE:
        return "bitsandbytes is not installed"
    groups = zip(optimizer.param_groups, configs, strict=True)
    if not any(c.optim_bits == 8 and can_store_8bit(p, c) for group, c in groups for p in group["params"]):
        return "outside CUDA states go to 8 bits only with force_8bit=True"
    return None
