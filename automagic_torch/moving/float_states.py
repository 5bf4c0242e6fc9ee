"""Reads one array's states as float32 and stores them in another form (docs/algorithm.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable

from automagic_core import Config, Slot, StatePlan, rounding_key
from automagic_core.arrays.state_forms import SLOTS
from automagic_torch.codec.stored import States, encoded_states, read_states

Rounding = Callable[[Slot], int] | None
"""The key of a slot's random bits; None rounds codes to nearest."""


def rounding(config: Config, step: int, plan: StatePlan) -> Rounding:
    """How an array's states are rounded: with the random bits of step t, or to nearest."""
    if not config.stochastic_rounding:
        return None
    return lambda slot: rounding_key(step, slot, plan.size)


def float_values(state: States, plan: StatePlan) -> States:
    """Reads the 8-bit states of one array as float32; all others stay as they are."""
    values = read_states({name: tensor[None] for name, tensor in state.items()}, plan)
    return {name: value.view(state[name].shape) for name, value in values.items()}


def stored_values(values: States, plan: StatePlan, key: Rounding) -> States:
    """Brings values as `float_values` returns them into the form that `plan` gives them, rounded by `key`."""
    to_quantize = {name: value[None] for name, value in values.items() if name in SLOTS and plan.quantized}
    quantized = {name: tensor[0] for name, tensor in encoded_states(to_quantize, plan, key).items()}
    return {**values, **quantized}
