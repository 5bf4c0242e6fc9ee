"""Brings the states of one array that an earlier version stored into today's form (docs/algorithm.md, section 6.4).

Up to version 0.1.0, and some time after, every factored moment had both statistics in float32, narrow arrays as wide
ones; `exp_avg_res` of ``factored="second_moment"`` had elements; all arrays with rows had `spatial_variance`, and all
arrays had `background_scale`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from automagic_core.arrays.state_forms import COMPANDED, SLOTS, Form, as_held, moment_of, state_forms
from automagic_core.arrays.state_plan import StatePlan
from automagic_core.config.config import Config
from automagic_core.moving.coded import codes, value
from automagic_core.moving.parts import in_parts, part_shapes

_FORMER_MIN_8BIT_SIZE = 4096
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
        States in today's form.  States that are in no earlier form are returned as they are.
    """
    before = state_forms(as_held(_plan_before(plan, config), states), warming)
    forms = state_forms(plan, warming)
    if forms == before or {name: _form(x) for name, x in states.items()} != before:
        return dict(states)
    bits_differ = plan.quantized != ("exp_avg_absmax" in states)
    if bits_differ and not (plan.quantized and plan.size < _FORMER_MIN_8BIT_SIZE):
        return dict(states)
    result: dict[str, Any] = {}
    for moment in SLOTS:
        own = {name: states[name] for name in before if moment_of(name) == moment}
        wanted = {name for name in forms if moment_of(name) == moment}
        if all(name in own and before[name] == forms[name] for name in wanted):
            result |= {name: own[name] for name in wanted}
        elif wanted:
            moved = _moved({name: to_numpy(x) for name, x in own.items()}, moment, plan)
            result |= {name: from_numpy(x) for name, x in moved.items()}
    return {name: states[name] for name in forms if name not in result} | result


def _plan_before(plan: StatePlan, config: Config) -> StatePlan:
    has_rows = plan.row_axis is not None
    return dataclasses.replace(
        plan,
        narrow=False,
        factored_res=has_rows and config.factored == "all",
        has_spatial_variance=has_rows and config.spatial_awareness,
        has_background_scale=True,
    )


def _moved(own: Mapping[str, np.ndarray], moment: str, plan: StatePlan) -> dict[str, np.ndarray]:
    held = {name: value(own, name, plan.block_size) for name in own if not name.endswith("_absmax")}
    result: dict[str, np.ndarray] = {}
    for name, x in in_parts(held, moment, part_shapes(plan, moment), np.ones(plan.shape, np.float32)).items():
        if not plan.parts(moment)[name].coded:
            result[name] = x.astype(np.float32)
        elif name in own and f"{name}_absmax" in own:
            result |= {name: own[name], f"{name}_absmax": own[f"{name}_absmax"]}
        else:
            result |= codes(np.sqrt(x) if moment in COMPANDED else x, name, plan.block_size)
    return result


def _form(x: Any) -> Form:
    return Form(tuple(x.shape), str(x.dtype).removeprefix("torch."))
