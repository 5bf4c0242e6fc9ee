"""Reads one array's states as float32 and stores them in another form (docs/algorithm.md, section 10)."""

from __future__ import annotations

from automagic_core import Config, StatePlan, rounding_key
from automagic_core.arrays.state_forms import coded_shapes
from automagic_torch.codec.stored import Key, States, encoded_states, read_states


def rounding(config: Config, step: int) -> Key | None:
    """How states are rounded: with the random bits of step t, or to nearest."""
    return (lambda slot, size: rounding_key(step, slot, size)) if config.stochastic_rounding else None


def float_values(state: States, plan: StatePlan) -> States:
    """Reads the 8-bit states of one array as float32; all others stay as they are."""
    values = read_states({name: tensor[None] for name, tensor in state.items()}, plan)
    return {name: value.view(state[name].shape) for name, value in values.items()}


def stored_values(values: States, plan: StatePlan, key: Key | None) -> States:
    """Brings values as `float_values` returns them into the form that `plan` gives them, rounded by `key`."""
    coded = coded_shapes(plan)
    to_quantize = {name: value[None] for name, value in values.items() if name in coded}
    quantized = {name: tensor[0] for name, tensor in encoded_states(to_quantize, coded, plan.block_size, key).items()}
    return {**values, **quantized}
