"""Shape and dtype of every stored array of a parameter, under flat names (section 6).

Flat names are those of PyTorch's state dicts and of the neutral file: an 8-bit state is two arrays, ``exp_avg`` and
``exp_avg_absmax``, a factored one ``exp_avg_sq_row`` and ``exp_avg_sq_col``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from automagic_core.arrays.layout import Shape
from automagic_core.arrays.state_plan import StatePlan
from automagic_core.codec.random_bits import Slot

SLOTS: Mapping[str, Slot] = {
    "exp_avg": Slot.exp_avg,
    "exp_avg_sq": Slot.exp_avg_sq,
    "exp_avg_res": Slot.exp_avg_res,
    "s": Slot.s,
}
"""States with one value per element, which are the ones that go to 8 bits."""
COMPANDED = ("exp_avg_sq", "exp_avg_res")
"""Those of them that are stored as their square root, with the unsigned codebook."""
ROW_STATES = ("lr_mask", "spatial_variance", "edge_history")
SCALARS = ("age", "skipped_steps", "torque_mean", "background_scale")
WARM_UP_ONLY = ("s", "s_absmax", "last_polarity")


class Form(NamedTuple):
    """Shape and dtype of one array; the dtype is a name such as ``"float32"``."""

    shape: Shape
    dtype: str


@lru_cache(maxsize=4096)
def state_forms(plan: StatePlan, warming: bool) -> dict[str, Form]:
    """Every stored array of a parameter by its flat name.

    Args:
        plan: which states there are.
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
    for name in ROW_STATES:
        if getattr(plan, "has_" + name):
            forms[name] = Form(plan.row_shape, "float32")
    forms["age"] = forms["skipped_steps"] = Form((), "int32")
    forms["torque_mean"] = forms["background_scale"] = Form((), "float32")
    return forms


def as_held(plan: StatePlan, states: Mapping[str, np.ndarray]) -> StatePlan:
    """The plan with the bits that the states really have, which depend on where they were kept."""
    return dataclasses.replace(plan, quantized="exp_avg_absmax" in states)


def check_states(states: Mapping[str, np.ndarray], plan: StatePlan, warming: bool, name: str) -> None:
    """Raises a ValueError unless the stored arrays of a parameter are those of its plan.

    Args:
        states: by flat name.
        plan, warming: as for `state_forms`.
        name: the parameter's, for the error.
    """
    forms = state_forms(plan, warming)
    for state, form in forms.items():
        if state not in states:
            raise ValueError(f"the state of {name} lacks {state}")
        found = Form(tuple(states[state].shape), str(states[state].dtype))
        if found != form:
            raise ValueError(
                f"the state of {name} has {state} of shape {found.shape} and {found.dtype}; "
                f"expected {form.shape} and {form.dtype}"
            )
    unknown = sorted(set(states) - set(forms))
    if unknown:
        raise ValueError(f"the state of {name} has unknown entries: {', '.join(unknown)}")
