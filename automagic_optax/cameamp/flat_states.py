"""Converts the states of one array between flat names and `ArrayState` (`docs/algorithm.md`, section 6.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from automagic_core import StatePlan
from automagic_core.arrays.state_forms import COMPANDED, moment_of
from automagic_optax.cameamp.states import WARM_UP_ONLY, ArrayState, initial_state
from automagic_optax.codec.quantized_array import QuantizedArray
from automagic_optax.codec.stored import moment_from, tensors_of


def flat_fields(array: ArrayState) -> dict[str, Any]:
    """The states of one array by their flat names."""
    fields: dict[str, Any] = {}
    for field, moment in array._asdict().items():
        for name, value in tensors_of(moment, field).items():
            if isinstance(value, QuantizedArray):
                fields |= {name: value.codes, f"{name}_absmax": value.absmax}
            elif value is not None:
                fields[name] = value
    return fields


def array_state(states: Mapping[str, np.ndarray], plan: StatePlan, warming: bool) -> ArrayState:
    """The states of one array, copied.

    Args:
        states: by flat name, as `automagic_core.arrays.state_forms.check_forms` accepts them; empty before the first
            step.
        plan: the array's plan; `states` decides between 8 and 32 bits.
        warming: whether the run is warming up; used where `states` is empty.
    """
    if not states:
        array = initial_state(plan)
        gone: dict[str, Any] = dict.fromkeys(WARM_UP_ONLY)
        return array if warming else array._replace(**gone)

    def part(name: str) -> Any:
        if f"{name}_absmax" in states:
            codes, absmax = jnp.array(states[name]), jnp.array(states[f"{name}_absmax"])
            return QuantizedArray(codes, absmax, moment_of(name) not in COMPANDED, plan.block_size)
        return jnp.array(states[name])

    def held(field: str) -> Any:
        parts = {name: part(name) for name in (field, f"{field}_row", f"{field}_col") if name in states}
        return moment_from(parts, field) if parts else None

    return ArrayState(**{field: held(field) for field in ArrayState._fields})
