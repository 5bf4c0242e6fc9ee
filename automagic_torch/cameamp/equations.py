"""The formulas of the update, as pure functions of stacked arrays in float32 (docs/algorithm.md, section 5).

States come and go as float32 arrays, stacked along a leading axis (`automagic_torch.arrays.stacked`).  R and C are row
and column statistics.  A function writes only into tensors that it made itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from automagic_core import Config, Decay, decay
from automagic_core.config.constants import (
    BACKGROUND_SLOPE,
    SPATIAL_DECAY,
    SPATIAL_FLOOR,
    SPATIAL_LIMITS,
    SPATIAL_NOISE,
    SQUARE_FLOOR,
    TORQUE_MEAN_FLOOR,
    TORQUE_SOFTNESS,
)
from automagic_torch.arrays.averages import ema, one_minus_power
from automagic_torch.arrays.means import Means

States = dict[str, Tensor]


class Direction(NamedTuple):
    """The result of one step for stacked arrays.

    Attributes:
        d: the step, a new float32 tensor in the shape of the gradient; the parameter moves along −d.
        kappa: the spatial factor κ of every row, or 1.
        b: the factor b of the weight decay, a new tensor in the shape of the gradient, or 1.
        mean_square: the mean of g² + 10⁻³⁰ over each array.
        states: new values of the states that change.
    """

    d: Tensor
    kappa: Tensor | float
    b: Tensor | float
    mean_square: Tensor
    states: States


Squares = tuple[Tensor, Tensor]
"""The means of g² over rows and over columns."""


def scale_by_cameamp(
    g: Tensor, squares: Squares | None, old: States, age: Tensor, config: Config, means: Means
) -> Direction:
    """One step of stacked arrays.

    Args:
        g: the gradients after the stages, finite float32, (arrays, *`StatePlan.shape`).
        squares: of g, if the second moment is factored.
        old: states before the step, float32; `s` only while the arrays have it.  Scalars have shape (arrays, 1, …, 1).
        age: the arrays' ages, this step included, float32.
        config: hyperparameters.
        means: forms means over rows, columns and arrays; its plan says which states there are.
    """
    plan = means.plan
    beta1, beta2, beta3 = (decay(beta) for beta in config.betas)
    correction2 = one_minus_power(beta2, age)
    root, mean_square, growth, new = second_moment(g, squares, old, age, correction2, means, beta2)
    u = (g / growth).div_(root).clamp_(-config.update_clip, config.update_clip)
    m_hat, states = momentum(u, old, age, beta1)
    new |= states
    r_hat, states = confidence(u, m_hat, old, age, means, beta3)
    new |= states
    d = m_hat.div_(r_hat.add_(config.confidence_floor).sqrt_())
    if config.torque:
        d, states = torque(d, u, old, config.torque_decay, means)
        new |= states
    kappa: Tensor | float = 1.0
    if plan.has_spatial_variance:
        kappa, states = spatial_factor(d, old, means)
        new |= states
    b: Tensor | float = 1.0
    if config.background_regularization:
        b, states = background(root, old, new, correction2, means)
        new |= states
    return Direction(d, kappa, b, mean_square, new)


class SecondMoment(NamedTuple):
    """The second moment after this step (section 5.1).

    Attributes:
        root: √v̂, where v̂ is at least 10⁻³⁰.
        mean_square: the mean of q over each array.
        growth: max(1, k), by how much the gradient of each array exceeds those so far.
        states: the new states.
    """

    root: Tensor
    mean_square: Tensor
    growth: Tensor
    states: States


def second_moment(
    g: Tensor, squares: Squares | None, old: States, age: Tensor, correction: Tensor, means: Means, beta: Decay
) -> SecondMoment:
    """Averages q = g² + 10⁻³⁰ (section 5.1); `correction` is 1 − β₂ᵃ."""
    if squares is not None:
        of_rows, of_columns = squares
        # The mean of q + 10⁻³⁰ is the mean of q, plus 10⁻³⁰.
        of_rows = of_rows + SQUARE_FLOOR
        R = ema(beta, old["exp_avg_sq_row"], of_rows)
        C = ema(beta, old["exp_avg_sq_col"], of_columns + SQUARE_FLOOR)
        # The clamp matters only for a β₂ so close to 1 that R begins below the normal numbers of float32.
        mean, mean_square = means.of_rows(exp_avg_sq_row=R, squares=of_rows)
        mean = mean.clamp(min=torch.finfo(R.dtype).tiny)
        # R / mean R comes first: the product R · C may underflow.
        v_hat = (R / mean / correction) * C
        states = {"exp_avg_sq_row": R, "exp_avg_sq_col": C}
    else:
        q = g.square().add_(SQUARE_FLOOR)
        v = ema(beta, old["exp_avg_sq"], q)
        v_hat = v / correction
        mean, mean_square = means.of_elements(exp_avg_sq=v, squares=q)
        states = {"exp_avg_sq": v}
    # At an array's first step k is 1, but for roundings.
    growth = (mean_square / mean * correction).sqrt_().clamp_(min=1.0).masked_fill_(age == 1, 1.0)
    return SecondMoment(v_hat.clamp_(min=SQUARE_FLOOR).sqrt_(), mean_square, growth, states)


def momentum(u: Tensor, old: States, age: Tensor, beta: Decay) -> tuple[Tensor, States]:
    """m̂ and the new momentum (section 5.2)."""
    m = ema(beta, old["exp_avg"], u)
    return m / one_minus_power(beta, age), {"exp_avg": m}


def confidence(u: Tensor, m_hat: Tensor, old: States, age: Tensor, means: Means, beta: Decay) -> tuple[Tensor, States]:
    """r̂ and the new states; r̂ says how far u strays from the momentum (section 5.3)."""
    # At an array's first step m̂ is u itself, and the difference in float32 would be noise.
    e = (u - m_hat).square_().mul_((age - 1).clamp_(max=1.0))
    if means.plan.factored_res:
        # The averages before this step, so that e is read only once.  A narrow array has one of them.
        averaged = {"exp_avg_res_row": means.rows, "exp_avg_res_col": means.columns}
        statistics = {name: old[name] for name in averaged if name in old}
        r, *others = statistics.values()
        if others:
            (mean,) = means.of_rows(exp_avg_res_row=r)
            r = r / mean.clamp(min=SQUARE_FLOOR) * others[0]
        # The denominator is 2 − β − βᵃ⁻¹, without cancellation.
        r_hat = (r + beta.complement).div_(beta.complement + one_minus_power(beta, age - 1))
        return r_hat, {
            name: means.averaged(name, beta, before, averaged[name](e)) for name, before in statistics.items()
        }
    r = ema(beta, old["exp_avg_res"], e)
    r_hat = (r + beta.complement).div_(beta.complement + one_minus_power(beta, age))
    return r_hat, {"exp_avg_res": r}


def torque(d: Tensor, u: Tensor, old: States, gamma: float, means: Means) -> tuple[Tensor, States]:
    """Scales d up where momentum and gradient agree, and returns the new torque states (section 5.4)."""
    x = d * u
    a = x.div_(x.abs().add_(TORQUE_SOFTNESS))
    states: States = {}
    if "s" in old:
        s = states["s"] = gamma * old["s"] + (1 - gamma) * a
    else:
        s = a
    tau = s.add(1).div_(2)
    states["torque_mean"] = means.arrays(tau)
    return tau.mul_(d).div_(old["torque_mean"].clamp(min=TORQUE_MEAN_FLOOR)), states


def spatial_factor(d: Tensor, old: States, means: Means) -> tuple[Tensor, States]:
    """κ of every row, from the variances of earlier steps, and the new variances (section 5.5)."""
    variance = old["spatial_variance"]
    (mean,) = means.of_rows(spatial_variance=variance)
    kappa = (mean / variance.clamp(min=SPATIAL_FLOOR)).sqrt_().clamp_(*SPATIAL_LIMITS)
    kappa.masked_fill_(mean <= SPATIAL_NOISE, 1.0)
    return kappa, {"spatial_variance": ema(decay(SPATIAL_DECAY), variance, means.row_variances(d))}


def background(root: Tensor, old: States, new: States, correction: Tensor, means: Means) -> tuple[Tensor, States]:
    """b and the new states; `correction` is 1 − β₂ᵃ (section 5.7)."""
    if means.plan.factored_sq:
        R, C = new["exp_avg_sq_row"], new["exp_avg_sq_col"]
        mean_root, mean_square = means.of_rows(root=R.sqrt(), exp_avg_sq_row=R)
        mean = mean_root * means.of_columns(C.sqrt()) / (mean_square * correction).sqrt_()
        states: States = {}
    else:
        mean = old["background_scale"]
        states = {"background_scale": means.arrays(root)}
    # b = 2 / (1 + exp(4 z)) with z = √v̂ / mean − 1, and z = 0 for an array that has no mean yet.
    unknown = mean == 0
    slope = (-BACKGROUND_SLOPE / mean).masked_fill_(unknown, 0.0)
    offset = torch.full_like(mean, BACKGROUND_SLOPE).masked_fill_(unknown, 0.0)
    return (root * slope).add_(offset).sigmoid_().mul_(2), states
