"""Which tensors `optimizer.state[p]` holds (section 6), and their way into float32 and back.

Every tensor is contiguous in the logical row-major order of its parameter, whatever memory format that has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from automagic_core import Slot, StatePlan
from automagic_core.arrays.state_forms import state_forms as core_state_forms
from automagic_torch.codec.quantized_tensor import QuantizedTensor

States = dict[str, Tensor]

SLOTS = {"exp_avg": Slot.exp_avg, "exp_avg_sq": Slot.exp_avg_sq, "exp_avg_res": Slot.exp_avg_res, "s": Slot.s}
"""States with one value per element, which are the ones that go to 8 bits."""
COMPANDED = ("exp_avg_sq", "exp_avg_res")
SCALARS = ("age", "skipped_steps", "torque_mean", "background_scale")
WARM_UP_ONLY = ("s", "s_absmax", "last_polarity")


class Form(NamedTuple):
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@lru_cache(maxsize=4096)
def state_forms(plan: StatePlan, warming: bool) -> dict[str, Form]:
    """Every tensor of an array's state by name.

    Args:
        plan: which states there are.
        warming: fewer than `warmup_steps` steps are over.
    """
    forms = core_state_forms(plan, warming)
    return {name: Form(form.shape, getattr(torch, form.dtype)) for name, form in forms.items()}


def read_states(stored: States, plan: StatePlan) -> States:
    """Stacked states in float32, to be read only.

    Args:
        stored: every state of some arrays, stacked: (arrays, *form).
        plan: theirs.

    Returns:
        Element-wise states as float32 arrays; one value per array in the shape (arrays, 1, …, 1).  `last_polarity`
        stays packed, integers stay integers.
    """
    values: States = {}
    for name, tensor in stored.items():
        if name in SLOTS and plan.quantized:
            absmax = stored[name + "_absmax"]
            values[name] = QuantizedTensor(tensor, absmax, name in COMPANDED, plan.block_size).read()
        elif name in SCALARS:
            values[name] = tensor.view(-1, *[1] * len(plan.shape))
        elif not name.endswith("_absmax"):
            values[name] = tensor
    return values


def encoded_states(new: States, plan: StatePlan, key: Callable[[Slot], int] | None) -> States:
    """Stacked states in the form that is stored.

    Args:
        new: as `read_states` gives them, only those that change.
        plan: the states' plan.
        key: gives the key of a slot's random bits; None rounds codes to nearest.
    """
    encoded: States = {}
    for name, value in new.items():
        if name in SLOTS and plan.quantized:
            quantized = QuantizedTensor.write(value, name in COMPANDED, plan.block_size, key and key(SLOTS[name]))
            encoded[name], encoded[name + "_absmax"] = quantized.codes, quantized.absmax
        else:
            encoded[name] = value.view(-1) if name in SCALARS else value
    return encoded
