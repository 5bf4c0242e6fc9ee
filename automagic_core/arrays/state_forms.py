"""Names, shapes and dtypes of all stored tensors of an array (docs/algorithm.md, section 6.1).

The names are those of PyTorch's state dicts and of the state file.  An 8-bit state is two tensors, ``exp_avg`` and
``exp_avg_absmax``.  A factored one is ``exp_avg_sq_row`` and ``exp_avg_sq_col``, of which one may again be two tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from automagic_core.arrays.state_plan import StatePlan
from automagic_core.codec.blocks import Shape, absmax_shape
from automagic_core.codec.random_bits import Slot

SLOTS: Mapping[str, Slot] = {
    "exp_avg": Slot.exp_avg,
    "exp_avg_sq": Slot.exp_avg_sq,
    "exp_avg_res": Slot.exp_avg_res,
    "s": Slot.s,
}
"""The moments, which are the states that can have 8 bits, and their slots."""
COMPANDED = ("exp_avg_sq", "exp_avg_res")
"""The states that are stored in 8 bits as their square root, with the unsigned codebook."""
ROW_STATES = ("lr_mask", "spatial_variance", "edge_history")
SCALARS = ("age", "skipped_steps", "torque_mean", "background_scale")
WARM_UP_ONLY = ("s", "s_absmax", "walk")
SEARCH_SCALARS = ("log_rate_scale", "walk_energy", "agreement", "peak_agreement", "first_norm", "gradient_norm")
SHARED_STATES = (*SEARCH_SCALARS, "norm_history", "norm_position")
"""The states that a group holds for all its arrays."""
STATISTICS = tuple(name + part for name in COMPANDED for part in ("_row", "_col"))
"""The parts of factored moments."""
_MOMENTS = tuple(name + part for name in (*SLOTS, *STATISTICS) for part in ("", "_absmax"))
FORMER_STATES = ("last_polarity",)
"""What arrays of version 0.1.0 had, the signs of their last gradients.  It is dropped."""
STATE_NAMES = frozenset({*_MOMENTS, *ROW_STATES, *SCALARS, *WARM_UP_ONLY, *FORMER_STATES})
"""Every name that a stored tensor of an array can have, or had."""


def own_states(state: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's own entries of an array's state; others may keep theirs beside them."""
    return {name: value for name, value in state.items() if name in STATE_NAMES}


def foreign_states(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an array's state that are somebody else's, such as the slow weights of timm's Lookahead."""
    return {name: value for name, value in state.items() if name not in STATE_NAMES}


def moment_of(name: str) -> str:
    """The moment to which a tensor belongs: ``"exp_avg_sq"`` for ``"exp_avg_sq_col_absmax"``."""
    return name.removesuffix("_absmax").removesuffix("_row").removesuffix("_col")


class Form(NamedTuple):
    """Shape and dtype of one tensor; the dtype is a name such as ``"float32"``."""

    shape: Shape
    dtype: str


@lru_cache(maxsize=4096)
def state_forms(plan: StatePlan, warming: bool) -> dict[str, Form]:
    """Every stored tensor of an array by its name.

    Args:
        plan: says which states there are.
        warming: fewer than `warmup_steps` steps are over.
    """
    forms: dict[str, Form] = {}
    for moment in SLOTS:
        if moment == "s" and not (warming and plan.has_s):
            continue
        for name, part in plan.parts(moment).items():
            forms[name] = Form(part.shape, "uint8" if part.coded else "float32")
            if part.coded:
                forms[name + "_absmax"] = Form(absmax_shape(part.shape, plan.block_size), "float32")
    if warming and plan.has_walk:
        forms["walk"] = Form(plan.row_shape, "float32")
    for name in ROW_STATES:
        if getattr(plan, "has_" + name):
            forms[name] = Form(plan.row_shape, "float32")
    forms["age"] = forms["skipped_steps"] = Form((), "int32")
    forms["torque_mean"] = Form((), "float32")
    if plan.has_background_scale:
        forms["background_scale"] = Form((), "float32")
    return forms


@lru_cache(maxsize=4096)
def coded_shapes(plan: StatePlan) -> Mapping[str, Shape]:
    """The tensors of an array that hold codes, and their shapes; `moment_of` says what they are codes of."""
    moments = [moment for moment in SLOTS if moment != "s" or plan.has_s]
    return {name: part.shape for moment in moments for name, part in plan.parts(moment).items() if part.coded}


def as_held(plan: StatePlan, states: Mapping[str, Any]) -> StatePlan:
    """The plan with the number of bits that the states have; it depends on the device that kept them."""
    return dataclasses.replace(plan, quantized="exp_avg_absmax" in states)


def check_forms(states: Mapping[str, np.ndarray], forms: Mapping[str, Form], owner: str) -> None:
    """Raises a ValueError unless `states` has exactly the names, shapes and dtypes of `forms`; it names `owner`."""
    for state, form in forms.items():
        if state not in states:
            raise ValueError(f"{owner} lacks {state}")
        found = Form(tuple(states[state].shape), str(states[state].dtype))
        if found != form:
            raise ValueError(
                f"{owner} has {state} of shape {found.shape} and {found.dtype}; expected {form.shape} and {form.dtype}"
            )
    unknown = sorted(set(states) - set(forms))
    if unknown:
        raise ValueError(f"{owner} has unknown entries: {', '.join(unknown)}")
