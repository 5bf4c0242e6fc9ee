"""Section 5 of the algorithm's page on one array, in float32: moments, confidence, torque, spatial factor, background.

Knows neither codes nor optimizers: states come and go as float32 arrays under the page's names.  R and C are row and
column statistics; they keep their reduced axes with length 1, so that they broadcast against the array.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from automagic_core import MAX_STEP, Config, Decay, StatePlan, decay
from automagic_core.constants import (
    BACKGROUND_SLOPE,
    SPATIAL_DECAY,
    SPATIAL_FLOOR,
    SPATIAL_LIMITS,
    SQUARE_FLOOR,
    TORQUE_MEAN_FLOOR,
    TORQUE_SOFTNESS,
)
from automagic_torch.averages import ema, one_minus_power

States = dict[str, Tensor]


class Direction(NamedTuple):
    """What one step gives for one array.

    Attributes:
        d: float32, the array's shape; the parameter moves along −d.
        kappa: the spatial factor of every row, `StatePlan.row_shape`, or 1.
        b: the background factor of the weight decay, the array's shape, or 1.
        states: new values of the states that change.
    """

    d: Tensor
    kappa: Tensor | float
    b: Tensor | float
    states: States


def scale_by_cameamp(g: Tensor, old: States, plan: StatePlan, config: Config) -> Direction:
    """One step of one array.

    Args:
        g: the gradient after section 4, finite float32.
        old: states before the step, float32 (`age` int32); `s` only while it is kept.
        plan: which states there are.
        config: hyperparameters.
    """
    beta1, beta2, beta3 = (decay(beta) for beta in config.betas)
    age = old["age"] + (old["age"] < MAX_STEP)
    new: States = {"age": age}

    v_hat, states = second_moment(g, old, age, plan, beta2)
    new |= states
    u = (g / v_hat.sqrt()).clamp(-config.update_clip, config.update_clip)
    m_hat, states = momentum(u, old, age, beta1)
    new |= states
    r_hat, states = confidence(u, m_hat, old, age, plan, beta3)
    new |= states
    d = m_hat / (r_hat + config.confidence_floor).sqrt()
    if config.torque:
        d, states = torque(d, u, old, config.torque_decay)
        new |= states
    kappa: Tensor | float = 1.0
    if plan.has_spatial_variance:
        kappa, states = spatial_factor(d, old, plan)
        new |= states
    b: Tensor | float = 1.0
    if config.background_regularization:
        b, states = background(v_hat, old, new, age, plan, beta2)
        new |= states
    return Direction(d, kappa, b, new)


def second_moment(g: Tensor, old: States, age: Tensor, plan: StatePlan, beta: Decay) -> tuple[Tensor, States]:
    """v̂, at least 10⁻³⁰."""
    q = g * g + SQUARE_FLOOR
    if plan.factored_sq:
        R = ema(old["exp_avg_sq_row"], row_means(q, plan), beta)
        C = ema(old["exp_avg_sq_col"], column_means(q, plan), beta)
        # The clamp only guards a β₂ so close to 1 that R begins below float32's normal numbers.
        v_hat = R / R.mean().clamp(min=torch.finfo(R.dtype).tiny) * C / one_minus_power(beta, age)
        return v_hat.clamp(min=SQUARE_FLOOR), {"exp_avg_sq_row": R, "exp_avg_sq_col": C}
    v = ema(old["exp_avg_sq"], q, beta)
    v_hat = v / one_minus_power(beta, age)
    return v_hat.clamp(min=SQUARE_FLOOR), {"exp_avg_sq": v}


def momentum(u: Tensor, old: States, age: Tensor, beta: Decay) -> tuple[Tensor, States]:
    """m̂."""
    m = ema(old["exp_avg"], u, beta)
    return m / one_minus_power(beta, age), {"exp_avg": m}


def confidence(
    u: Tensor, m_hat: Tensor, old: States, age: Tensor, plan: StatePlan, beta: Decay
) -> tuple[Tensor, States]:
    """r̂: how far u strays from the momentum, with one pseudo-observation of 1."""
    # At its first step an array's m̂ is u itself; what float32 leaves of the difference is noise.
    e = torch.where(age == 1, 0.0, (u - m_hat) ** 2)
    if plan.factored_res:
        # Of the step before, so that e is read once.
        R, C = old["exp_avg_res_row"], old["exp_avg_res_col"]
        r = R / R.mean().clamp(min=SQUARE_FLOOR) * C
        # 2 − β − βᵗ⁻¹, without the cancellation
        r_hat = (r + beta.complement) / (beta.complement + one_minus_power(beta, age - 1))
        R = ema(R, row_means(e, plan), beta)
        C = ema(C, column_means(e, plan), beta)
        return r_hat, {"exp_avg_res_row": R, "exp_avg_res_col": C}
    r = ema(old["exp_avg_res"], e, beta)
    r_hat = (r + beta.complement) / (beta.complement + one_minus_power(beta, age))
    return r_hat, {"exp_avg_res": r}


def torque(d: Tensor, u: Tensor, old: States, gamma: float) -> tuple[Tensor, States]:
    """d, longer where it agrees with the gradient."""
    x = d * u
    a = x / (x.abs() + TORQUE_SOFTNESS)
    states: States = {}
    if "s" in old:
        s = states["s"] = gamma * old["s"] + (1 - gamma) * a
    else:
        s = a
    tau = (1 + s) / 2
    states["torque_mean"] = tau.mean()
    return d * tau / old["torque_mean"].clamp(min=TORQUE_MEAN_FLOOR), states


def spatial_factor(d: Tensor, old: States, plan: StatePlan) -> tuple[Tensor, States]:
    """κ of every row, from the variances of the steps before: rows that vary more than the mean row move less."""
    variance = old["spatial_variance"]
    mean = variance.mean()
    kappa = (mean / variance.clamp(min=SPATIAL_FLOOR)).sqrt().clamp(*SPATIAL_LIMITS)
    kappa = torch.where(mean == 0, 1.0, kappa)
    now = d.var(dim=plan.column_axes, correction=0, keepdim=True)
    return kappa, {"spatial_variance": ema(variance, now, decay(SPATIAL_DECAY))}


def background(
    v_hat: Tensor, old: States, new: States, age: Tensor, plan: StatePlan, beta: Decay
) -> tuple[Tensor, States]:
    """b: near 2 where the gradients are small for the array, near 0 where they are large."""
    root = v_hat.sqrt()
    if plan.factored_sq:
        R, C = new["exp_avg_sq_row"], new["exp_avg_sq_col"]
        mean = R.sqrt().mean() * C.sqrt().mean() / R.mean().sqrt() / one_minus_power(beta, age).sqrt()
        states: States = {}
    else:
        mean = old["background_scale"]
        states = {"background_scale": root.mean()}
    b = 2 / (1 + torch.exp(BACKGROUND_SLOPE * (root / mean - 1)))
    return torch.where(mean > 0, b, 1.0), states


def row_means(x: Tensor, plan: StatePlan) -> Tensor:
    """Mean over the columns: `StatePlan.row_shape`."""
    return x.mean(dim=plan.column_axes, keepdim=True)


def column_means(x: Tensor, plan: StatePlan) -> Tensor:
    """Mean over the row axis: `StatePlan.column_shape`."""
    return x.mean(dim=_known(plan.row_axis), keepdim=True)


def _known(axis: Any) -> int:
    assert isinstance(axis, int), "only arrays with rows are factored"
    return axis
