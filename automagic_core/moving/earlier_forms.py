"""Brings the states of one array that an earlier version stored into today's form (docs/algorithm.md, section 6.4).

Up to version 0.1.0, and some time after, every factored moment had both statistics in float32, narrow arrays as wide
ones; `exp_avg_res` of ``factored="second_moment"`` had elements; all arrays with rows had `spatial_variance`, and all
arrays had `background_scale`.  Arrays that searched had the signs of their last gradients, `last_polarity`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from automagic_core.arrays.coded import codes, value
from automagic_core.arrays.parts import in_parts
from automagic_core.arrays.state_forms import COMPANDED, FORMER_STATES, SLOTS, Form, as_held, moment_of, state_forms
from automagic_core.arrays.state_plan import StatePlan
from automagic_core.codec.blocks import Shape
from automagic_core.config.config import Config

FORMER_MIN_8BIT_SIZE = 4096
"""The default up to then."""


def in_todays_form(
    states: Mapping[str, Any],
    plan: StatePlan,
    config: Config,
    warming: bool,
    *,
    to_numpy: Callable[[Any], np.ndarray] = np.asarray,
    from_numpy: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """The states of one array as `plan` has them.

    Elements become means along the longer axis, and a long statistic is rounded to the nearest codes.  Everything else
    keeps every bit, or is dropped where today's arrays have no use for it.

    Args:
        states: by flat name, arrays of any framework.
        plan, config: of the array today.
        warming: fewer than `warmup_steps` steps are over.
        to_numpy, from_numpy: convert the arrays; only those are converted that change.

    Returns:
        States in today's form.  States that are in no earlier form are returned as they are, without `FORMER_STATES`.
    """
    states = {name: x for name, x in states.items() if name not in FORMER_STATES}
    before = state_forms(as_held(_plan_before(plan, config), states), warming)
    forms = state_forms(plan, warming)
    if forms == before or {name: form_of(x) for name, x in states.items()} != before:
        return states
    bits_differ = plan.quantized != ("exp_avg_absmax" in states)
    if bits_differ and not (plan.quantized and plan.size < FORMER_MIN_8BIT_SIZE):
        return states
    return moved(states, forms, plan.shape, plan.block_size, to_numpy, from_numpy)


def _plan_before(plan: StatePlan, config: Config) -> StatePlan:
    has_rows = plan.row_axis is not None
    return dataclasses.replace(
        plan,
        narrow=False,
        factored_res=has_rows and config.factored == "all",
        has_spatial_variance=has_rows and config.spatial_awareness,
        has_background_scale=True,
    )


def moved(
    states: Mapping[str, Any],
    forms: Mapping[str, Form],
    shape: Shape,
    block_size: int | None,
    to_numpy: Callable[[Any], np.ndarray],
    from_numpy: Callable[[np.ndarray], Any],
) -> dict[str, Any]:
    """States of an array in other forms, rounded to nearest; a tensor that has its form keeps every bit.

    Args:
        states: as for `in_todays_form`; what is not wanted is dropped.
        forms: the wanted ones.
        shape: the array's.
        block_size: elements per block, or None.
        to_numpy, from_numpy: as for `in_todays_form`.
    """
    result: dict[str, Any] = {}
    for moment in SLOTS:
        own = {name: x for name, x in states.items() if moment_of(name) == moment}
        wanted = {name: form for name, form in forms.items() if moment_of(name) == moment}
        if all(name in own and form_of(own[name]) == form for name, form in wanted.items()):
            continue
        held = {name: to_numpy(x) for name, x in own.items()}
        values = {name: value(held, name, block_size) for name in held if not name.endswith("_absmax")}
        shapes = {name: form.shape for name, form in wanted.items() if not name.endswith("_absmax")}
        for name, x in in_parts(values, moment, shapes, np.ones(shape, np.float32)).items():
            if name in own and form_of(own[name]) == wanted[name]:
                continue
            stored = {name: np.asarray(x, np.float32)}
            if f"{name}_absmax" in wanted:
                stored = codes(np.sqrt(x) if moment in COMPANDED else x, name, block_size)
            result |= {key: from_numpy(y) for key, y in stored.items()}
    return {name: states[name] for name in forms if name not in result} | result


def form_of(x: Any) -> Form:
    """Shape and dtype of an array of any framework."""
    return Form(tuple(x.shape), str(x.dtype).removeprefix("torch."))
