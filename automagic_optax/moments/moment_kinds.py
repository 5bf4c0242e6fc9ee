"""Decides which states of optax transformations can have 8 bits, and which are never negative.

`docs/algorithm.md`, section 12.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

NONNEGATIVE_FIELDS = frozenset(
    {"nu", "nu_max", "v", "sum_of_squares", "exp_avg_sq", "exp_avg_res", "grad_sum_sq", "e_g", "e_x", "step_sizes"}
)
"""Names that optax, and most code written for it, gives to means and sums of squares."""

_ALSO_NONNEGATIVE = {("ScaleByAdanState", "n"), ("ScaleBySimplifiedAdEMAMixState", "n")}
_SIGNED = {
    ("ScaleByAdanState", "v"),  # the mean of gradient differences
    ("SophiaState", "nu"),  # the mean of an estimated curvature
    ("ScaleBySM3State", "nu"),  # the momentum
}

KEPT = frozenset(
    {
        "ScaleByRStdDevState",  # nu − mu² may become negative when both are rounded
        "ScaleByRStdDevWithCountState",
        "MadgradState",  # computes the parameters from its sums
        "COCOBState",
        "ScaleByLBFGSState",  # differences of successive parameters and gradients
        "ScaleByBacktrackingLinesearchState",  # uses a gradient of the last step again
        "ScaleByZoomLinesearchState",
        "ZoomLinesearchState",
        "MultiStepsState",  # a sum of gradients: each addition would round the whole sum again
        "ApplyEvery",
        "GaLoreState",  # an orthogonal projector
        "SnapshotState",  # reports
    }
)
"""Classes of states that stay as they are: an error of 8 bits in them does more than add noise to an update."""

# MoMo's rate is a small difference of <exp_avg, params> and exact averages: with 8 bits in it many rates are 0.
_ALSO_KEPT = {("MomoState", "exp_avg"), ("MomoAdamState", "exp_avg")}


def is_kept(owner: type | None, field: str) -> bool:
    """Whether a state stays as it is, by its name and the class that holds it."""
    name = getattr(owner, "__name__", "")
    return name in KEPT or (name, field) in _ALSO_KEPT


def is_nonnegative(owner: type | None, field: str) -> bool:
    """Whether a state is known to be never negative, by its name and the class that holds it."""
    name = (getattr(owner, "__name__", ""), field)
    return name in _ALSO_NONNEGATIVE or (field in NONNEGATIVE_FIELDS and name not in _SIGNED)


def begins_with_parameters(init: Callable[[Any], Any], params: Any) -> list[bool]:
    """Which arrays of a first state are computed from the values of the parameters.

    A moment begins at a constant.  A state that begins with the parameters' values is a copy of them (the `z` of
    schedule-free, the starting point of Prodigy, slow weights), and 8 bits are too few for parameters.

    Args:
        init: a transformation's `init`; it is traced.
        params: the parameters.

    Returns:
        One boolean for each leaf of ``init(params)``.
    """
    closed = jax.make_jaxpr(init)(params)
    return _depends(closed.jaxpr, [True] * len(closed.jaxpr.invars))


def _depends(jaxpr: Jaxpr, inputs: list[bool]) -> list[bool]:
    touched: set[Var] = {v for v, is_touched in zip(jaxpr.invars, inputs, strict=True) if is_touched}

    def is_touched(atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in touched

    for equation in jaxpr.eqns:
        given = [is_touched(atom) for atom in equation.invars]
        inside = equation.params.get("jaxpr")
        if isinstance(inside, ClosedJaxpr) and len(inside.jaxpr.invars) == len(given):
            outputs = _depends(inside.jaxpr, given)  # a jitted function, which may look at a shape alone
        else:
            outputs = [any(given)] * len(equation.outvars)
        touched.update(v for v, is_output in zip(equation.outvars, outputs, strict=True) if is_output)
    return [is_touched(atom) for atom in jaxpr.outvars]
