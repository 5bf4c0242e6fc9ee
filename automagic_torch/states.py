"""Which tensors `optimizer.state[p]` holds (section 6), and their way into float32 and back.

Every tensor is contiguous in the logical row-major order of its parameter, whatever memory format that has.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from automagic_core import Slot, StatePlan, rounding_key
from automagic_torch import polarity
from automagic_torch.codec import QuantizedTensor

States = dict[str, Tensor]

SLOTS = {"exp_avg": Slot.exp_avg, "exp_avg_sq": Slot.exp_avg_sq, "exp_avg_res": Slot.exp_avg_res, "s": Slot.s}
"""States with one value per element, which are the ones that go to 8 bits."""
COMPANDED = ("exp_avg_sq", "exp_avg_res")
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
    forms: dict[str, Form] = {}

    def element_wise(name: str) -> None:
        forms[name] = Form(plan.shape, torch.uint8 if plan.quantized else torch.float32)
        if plan.quantized:
            forms[name + "_absmax"] = Form(plan.absmax_shape, torch.float32)

    def row_and_column(name: str) -> None:
        forms[name + "_row"] = Form(plan.row_shape, torch.float32)
        forms[name + "_col"] = Form(plan.column_shape, torch.float32)

    element_wise("exp_avg")
    (row_and_column if plan.factored_sq else element_wise)("exp_avg_sq")
    (row_and_column if plan.factored_res else element_wise)("exp_avg_res")
    if warming and plan.has_s:
        element_wise("s")
    if warming and plan.has_last_polarity:
        forms["last_polarity"] = Form(plan.polarity_shape, torch.uint8)
    if plan.has_lr_mask:
        forms["lr_mask"] = Form(plan.row_shape, torch.float32)
    if plan.has_spatial_variance:
        forms["spatial_variance"] = Form(plan.row_shape, torch.float32)
    if plan.has_edge_history:
        forms["edge_history"] = Form(plan.row_shape, torch.float32)
    forms["age"] = forms["skipped_steps"] = Form((), torch.int32)
    forms["torque_mean"] = forms["background_scale"] = Form((), torch.float32)
    return forms


def new_state(plan: StatePlan, warming: bool, device: torch.device) -> States:
    """The state before an array's first step: zeros, except `torque_mean`, which is 1."""
    state = {
        name: torch.zeros(form.shape, dtype=form.dtype, device=device)
        for name, form in state_forms(plan, warming).items()
    }
    state["torque_mean"].fill_(1.0)
    return state


def read_state(state: States, plan: StatePlan) -> States:
    """The same state in float32, `last_polarity` as bool; integers stay."""
    values: States = {}
    for name, stored in state.items():
        if name == "last_polarity":
            values[name] = polarity.unpack(stored, torch.Size(plan.shape))
        elif name in SLOTS and plan.quantized:
            absmax = state[name + "_absmax"]
            values[name] = QuantizedTensor(stored, absmax, name in COMPANDED, plan.block_size).read()
        elif not name.endswith("_absmax"):
            values[name] = stored
    return values


def write_state(state: States, new: States, ok: Tensor, plan: StatePlan, step: int, stochastic: bool) -> None:
    """Stores new values in the form that the state has.

    The tensors are replaced, not written into, so that an earlier `state_dict` keeps its values.

    Args:
        state: changed in place.
        new: as `read_state` gives them, only those that change.
        ok: 0-d bool; False leaves every stored bit.
        plan: the state's plan.
        step: t, for the random bits.
        stochastic: round codes stochastically, else to nearest.
    """
    stored: States = {}
    for name, value in new.items():
        if name == "last_polarity":
            stored[name] = polarity.pack(value)
        elif name in SLOTS and plan.quantized:
            key = rounding_key(step, SLOTS[name], plan.size) if stochastic else None
            quantized = QuantizedTensor.write(value, name in COMPANDED, plan.block_size, key)
            stored[name], stored[name + "_absmax"] = quantized.codes, quantized.absmax
        else:
            stored[name] = value
    for name, tensor in stored.items():
        state[name] = torch.where(ok, tensor, state[name])
