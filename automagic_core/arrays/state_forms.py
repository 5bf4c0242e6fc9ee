"""Names, shapes and dtypes of all stored tensors of an array (docs/algorithm.md, section 6.1).

The names are those of PyTorch's state dicts and of the state file.  An 8-bit state is two tensors, ``exp_avg`` and
``exp_avg_absmax``.  A factored one is ``exp_avg_sq_row`` and ``exp_avg_sq_col``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from automagic_core.arrays.state_plan import StatePlan
from automagic_core.codec.blocks import Shape
from automagic_core.codec.random_bits import Slot

SLOTS: Mapping[str, Slot] = {
    "exp_avg": Slot.exp_avg,
    "exp_avg_sq": Slot.exp_avg_sq,
    "exp_avg_res": Slot.exp_avg_res,
    "s": Slot.s,
}
"""The states with one value per element, which are those that can have 8 bits, and their slots."""
COMPANDED = ("exp_avg_sq", "exp_avg_res")
"""The states that are stored in 8 bits as their square root, with the unsigned codebook."""
ROW_STATES = ("lr_mask", "spatial_variance", "edge_history")
SCALARS = ("age", "skipped_steps", "torque_mean", "background_scale")
WARM_UP_ONLY = ("s", "s_absmax", "last_polarity", "walk")
SEARCH_SCALARS = ("log_rate_scale", "walk_energy", "agreement", "peak_agreement", "first_norm", "gradient_norm")
SHARED_STATES = (*SEARCH_SCALARS, "norm_history", "norm_position")
"""The states that a group holds for all its arrays."""
_CODED = tuple(name + part for name in SLOTS for part in ("", "_absmax"))
_FACTORED = tuple(name + part for name in COMPANDED for part in ("_row", "_col"))
STATE_NAMES = frozenset({*_CODED, *_FACTORED, *ROW_STATES, *SCALARS, *WARM_UP_ONLY})
"""Every name that a stored tensor of an array can have."""


def own_states(state: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's own entries of an array's state; others may keep theirs beside them."""
    return {name: value for name, value in state.items() if name in STATE_NAMES}


def foreign_states(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an array's state that are somebody else's, such as the slow weights of timm's Lookahead."""
    return {name: value for name, value in state.items() if name not in STATE_NAMES}


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

    def element_wise(name: str) -> None:
        forms[name] = Form(plan.shape, "uint8" if plan.quantized else "float32")
        if plan.quantized:
            forms[name + "_absmax"] = Form(plan.absmax_shape, "float32")

    def moment(name: str, factored: bool) -> None:
        if not factored:
            return element_wise(name)
        forms[name + "_row"] = Form(plan.row_shape, "float32")
        forms[name + "_col"] = Form(plan.column_shape, "float32")

    element_wise("exp_avg")
    moment("exp_avg_sq", plan.factored_sq)
    moment("exp_avg_res", plan.factored_res)
    if warming and plan.has_s:
        element_wise("s")
    if warming and plan.has_last_polarity:
        forms["last_polarity"] = Form(plan.polarity_shape, "uint8")
    if warming and plan.has_walk:
        forms["walk"] = Form(plan.row_shape, "float32")
    for name in ROW_STATES:
        if getattr(plan, "has_" + name):
            forms[name] = Form(plan.row_shape, "float32")
    forms["age"] = forms["skipped_steps"] = Form((), "int32")
    forms["torque_mean"] = forms["background_scale"] = Form((), "float32")
    return forms


def as_held(plan: StatePlan, states: Mapping[str, np.ndarray]) -> StatePlan:
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
