"""The states of one array as float32 values, and those values in the form of a plan.

For what happens between steps, array by array; within a step `states` does the same for stacked arrays.
"""

from __future__ import annotations

from collections.abc import Callable

from automagic_core import Config, Slot, StatePlan, rounding_key
from automagic_torch.codec.quantized_tensor import QuantizedTensor
from automagic_torch.codec.stored import COMPANDED, SLOTS, States

Rounding = Callable[[Slot], int] | None
"""The key of a slot's random bits; None rounds codes to nearest."""


def rounding(config: Config, step: int, plan: StatePlan) -> Rounding:
    """How an array's states are rounded after step t: as that step would have rounded them."""
    if not config.stochastic_rounding:
        return None
    return lambda slot: rounding_key(step, slot, plan.size)


def float_values(state: States, plan: StatePlan) -> States:
    """The state with every 8-bit tensor read into float32; all others as they stand."""
    values: States = {}
    for name, tensor in state.items():
        if name in SLOTS and plan.quantized:
            absmax = state[name + "_absmax"]
            stored = QuantizedTensor(tensor[None], absmax[None], name in COMPANDED, plan.block_size)
            values[name] = stored.read()[0]
        elif not name.endswith("_absmax"):
            values[name] = tensor
    return values


def stored_values(values: States, plan: StatePlan, key: Rounding) -> States:
    """The state in the form that the plan gives it.

    Args:
        values: as `float_values` gives them.
        plan: theirs, but for the number of bits, which is that of the result.
        key: how 8-bit states are rounded.
    """
    state: States = {}
    for name, value in values.items():
        if name in SLOTS and plan.quantized:
            slot = SLOTS[name]
            stored = QuantizedTensor.write(value[None], name in COMPANDED, plan.block_size, key and key(slot))
            state[name], state[name + "_absmax"] = stored.codes[0], stored.absmax[0]
        else:
            state[name] = value
    return state
