"""The rate search and the rates (docs/algorithm.md, sections 5.6 and 5.8).

Nothing waits for a device.  Rates are 0-d float32 tensors, formed once per call, group and device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automagic_core import Config, StatePlan
from automagic_core.config.constants import (
    AGREEMENT_DECAY,
    AGREES,
    AGREES_AGAIN,
    CLIMB,
    CLIMB_STEPS,
    DOUBT,
    LARGEST_GROWTH,
    LARGEST_RISE,
    LEAST_GROWTH,
    LEAST_PEAK,
    RISE_BY_VOTES,
    ROW_LIMIT,
    ROW_SHRINKAGE,
    SEARCH_START,
    SHORT_STEP,
    STEP_BACK,
)
from automagic_torch.arrays.means import Means
from automagic_torch.arrays.stacked import spread, to_device
from automagic_torch.codec.random_bits import signs


def starting_rate(lr: float | Tensor, device: torch.device) -> Tensor:
    """η₀ as 0-d float32; 0 where `lr` is NaN, infinite or negative."""
    if isinstance(lr, Tensor):
        eta = to_device(lr.detach().reshape(()).float(), device)
        return torch.where((eta >= 0) & (eta < math.inf), eta, 0.0)
    lr = float(lr) if 0 <= lr <= torch.finfo(torch.float32).max else 0.0
    return torch.full((), lr, dtype=torch.float32, device=device)


class Rates(NamedTuple):
    """The rates that all arrays of a group on one device share, 0-d float32."""

    eta: Tensor
    """η: η₀ with the ramp, where there is one."""
    ell: Tensor
    """ℓ in this step."""
    array: Tensor
    """η̂."""
    min_lr: float | Tensor
    max_lr: float | Tensor

    def rows(self, delta: Tensor | None, kappa: Tensor | float) -> Tensor:
        """ηᵢ of every row, (arrays, *`StatePlan.row_shape`); 0-d for arrays without row states.

        Args:
            delta: `lr_mask` before this step, or None.
            kappa: the spatial factor κ.
        """
        exponent = self.ell if delta is None else self.ell + delta
        return _limited(self.eta * kappa, exponent, self.min_lr, self.max_lr)


def rates(lr: float | Tensor, log_rate_scale: Tensor, step: int, config: Config, device: torch.device) -> Rates:
    """The shared rates at step t.  The limits hold for what is found, and never for η itself."""
    eta = starting_rate(lr, device)
    ell = to_device(log_rate_scale, device)
    if step == 1 and config.searches:
        ell = torch.minimum(ell, math.log(SEARCH_START) - eta.clamp(min=torch.finfo(torch.float32).tiny).log())
    if step < config.ramp_steps:
        eta = eta * (step / config.ramp_steps)
    array = _limited(eta, ell, config.min_lr, config.max_lr)
    return Rates(eta, ell, array, config.min_lr, config.max_lr)


def _limited(rate: Tensor, found: Tensor, min_lr: Any, max_lr: Any) -> Tensor:
    """rate · exp(found).  The limits bound what is found, never the rate that was asked for."""
    return (found.exp() * rate).clamp(rate.clamp(max=min_lr), rate.clamp(min=max_lr))


class Vote(NamedTuple):
    """The votes of stacked arrays: how far gradients agree in sign with the momentum."""

    rows: Tensor | None
    """aᵢ, (arrays, *`StatePlan.row_shape`); None for arrays without `lr_mask`."""
    row_weight: Tensor | None
    """Σⱼ |gᵢⱼ|."""
    weight: Tensor
    """Σ |g| of every array, (arrays,)."""
    array: Tensor
    """ā, (arrays,); 0 for an array that does not count."""
    counts: Tensor
    """(arrays,) bool: whether the array takes part in the pooled vote."""
    size: int
    """Elements of one array."""


def vote(g: Tensor, exp_avg: Tensor, took_a_step: Tensor, means: Means) -> Vote:
    """The vote of stacked arrays at step t ≥ 2.

    Args:
        g: the gradients after the stages, float32, (arrays, *`StatePlan.shape`).
        exp_avg: the momentum before this step, in the shape of g.
        took_a_step: (arrays,) bool: the array has taken an earlier step and is not skipped now.
        means: forms sums over rows and arrays.
    """
    plan = means.plan
    weight = g.abs()
    # |g| · vote: g times the sign of the momentum is positive where the two agree.
    votes = g * exp_avg.sign()
    rows = row_weight = None
    if plan.has_lr_mask:
        weight, votes = means.row_sums(weight, votes)
        row_weight, rows = weight, votes / weight
    total, agreed = means.sums(weight, votes, of_rows=plan.has_lr_mask)
    counts = took_a_step & (total > 0)
    array = (agreed / total).masked_fill_(~counts, 0.0)
    return Vote(rows, row_weight, total, array, counts, plan.size)


def new_walk(walk: Tensor, delta: Tensor, means: Means, key: int | Tensor) -> Tensor:
    """The walk after this step.

    Args:
        walk: what is kept of it before the step, (arrays, *`StatePlan.row_shape`).
        delta: −ηᵢ d, the steps without the weight decay, in the shape of the arrays.
        means: forms sums over rows and arrays.
        key: of the signs: `automagic_core.rounding_key` of step 0.
    """
    signed = signs(key, delta[0].numel(), delta.device).view(delta.shape[1:]) * delta
    if means.plan.row_axis is not None:
        (along,) = means.row_sums(signed)
    else:
        (along,) = means.sums(signed, of_rows=False)
    return walk - along.view_as(walk)


class Evidence(NamedTuple):
    """What arrays of a group say to its search in one step; float32, (arrays,)."""

    walk_square: Tensor
    """Σ walk²."""
    moved: Tensor
    """The number of elements; 0 for an array that is skipped or has no gradient other than 0."""
    gradient_square: Tensor
    """Σ g²; 0 for an array that is skipped."""


def evidence(walk: Tensor, mean_square: Tensor, g: Tensor, ok: Tensor, v: Vote | None, means: Means) -> Evidence:
    """The evidence of stacked arrays.

    Args:
        walk: after this step.
        mean_square: the mean of g² over each array.
        g: the gradients after the stages.
        ok: (arrays,) bool: those that are not skipped.
        v: their vote, where votes are cast.
        means: forms sums over arrays.
    """
    (walk_square,) = means.sums(walk.square(), of_rows=True)
    (weight,) = means.sums(g.abs(), of_rows=False) if v is None else (v.weight,)
    moved = (ok & (weight > 0)).float() * means.plan.size
    return Evidence(walk_square.view(-1), moved, mean_square.view(-1) * ok * means.plan.size)


def pooled(votes: Sequence[Vote], device: torch.device) -> tuple[Tensor, Tensor]:
    """â of a group, and whether any array votes, both 0-d on `device`."""
    # For every batch Σ size · ā and Σ size, over the arrays that vote.
    sums = [to_device(torch.stack([v.array, v.counts.float()]).sum(1) * v.size, device) for v in votes]
    total, size = torch.stack(sums).sum(0)
    return total / size, size > 0


class Search(NamedTuple):
    """What a group holds for its search (docs/algorithm.md, section 5.8); 0-d float32."""

    log_rate_scale: Tensor
    """ℓ."""
    walk_energy: Tensor
    """E: the Σ walk² that a random walk of the same steps would have on average."""
    agreement: Tensor
    """A, the average of the pooled votes; exactly 0 before the first."""
    peak_agreement: Tensor
    """P, the highest A so far; with a minus after the climb."""
    first_norm: Tensor
    """F, the mean of ‖g‖ over the first steps; 0 where it is not known."""
    gradient_norm: Tensor
    """G, the average of ‖g‖."""

    def kept(self, config: Config) -> Tensor | float:
        """What is kept of the walk before a step, and of E: 0 in the climb, else 1."""
        return (self.peak_agreement < 0).float() if config.climbs else 1.0


def agreed(agreement: Tensor, a_hat: Tensor, any_votes: Tensor) -> Tensor:
    """The average of the pooled votes after this step's."""
    averaged = AGREEMENT_DECAY * agreement + (1 - AGREEMENT_DECAY) * a_hat
    return torch.where(any_votes, torch.where(agreement == 0, a_hat, averaged), agreement)


def searched(search: Search, found: Sequence[Evidence], rates: Rates, step: int, config: Config) -> Search:
    """The search after step t.

    Args:
        search: before it, but with this step's agreement.
        found: the evidence of all arrays.
        rates: those of this step; their η is η₀, since a search has no ramp.
        step: t.
        config: hyperparameters.
    """
    ell, energy, agreement, peak, first, norm = search
    sums = [to_device(torch.stack(e).sum(1), ell.device) for e in found]
    walk_square, moved, gradient_square = torch.stack(sums).sum(0)
    of_step = rates.array.square() * moved
    energy = search.kept(config) * energy + of_step
    # log(ρ / s)
    straightness = 0.5 * (walk_square / energy).log() - math.log(config.straightness)
    of_gradients = gradient_square.sqrt()
    if step < CLIMB_STEPS:
        new_norm = new_first = torch.where(first > 0, first + (of_gradients - first) / step, of_gradients)
    else:
        new_norm, new_first = AGREEMENT_DECAY * norm + (1 - AGREEMENT_DECAY) * of_gradients, first
    first, norm = torch.where(moved > 0, new_first, first), torch.where(moved > 0, new_norm, norm)
    growth = torch.where(first > 0, norm / first, 0.0)
    beyond = (straightness - growth.clamp(LEAST_GROWTH, 1.0).log()).clamp(0.0, LARGEST_RISE)
    beyond = beyond * (LARGEST_GROWTH - growth).clamp(0.0, 1.0)
    moves = of_step > 0
    long = moves & (SHORT_STEP * step * of_step >= energy)
    rise = torch.where(long, config.search_gain * beyond, 0.0)
    if config.climbs:
        of_agreement, at_most = RISE_BY_VOTES
        least = (-AGREES * peak.abs()).clamp(min=config.agreement_floor)
        believed = torch.where(straightness > 0, agreement, torch.minimum(agreement, DOUBT * agreement))
        rise = torch.minimum(rise, (of_agreement * (believed - least)).clamp(0.0, at_most))
        # A step of the rate 0 says nothing, nor does one in which no array moves.
        climbing = climbs = moves & (peak >= 0)
        climb = torch.full_like(rise, CLIMB)
        to_start = math.log(SEARCH_START) - rates.array.log()
        if step >= CLIMB_STEPS:
            peak = torch.where(climbing, torch.maximum(peak, agreement), peak)
            size, (most, of_peak) = peak.abs().clamp(min=LEAST_PEAK), STEP_BACK
            back = (of_peak * size).clamp(max=most)
            agrees = (agreement > 0) & (agreement >= AGREES * size)
            ends = climbing & (agreement != 0) & ~agrees
            again = long & (peak < 0) & agrees & (agreement >= AGREES_AGAIN)
            rise = torch.where(climbing, torch.where(ends, torch.maximum(to_start, -back).clamp(max=0.0), 0.0), rise)
            climb = CLIMB * ((agreement / size - AGREES) / (1 - AGREES)).clamp(0.0, 1.0) + torch.where(again, back, 0.0)
            climbs = again | (climbing & agrees)
            peak = torch.where(ends, -size, torch.where(climbs, size, peak))
        rise = torch.where(climbs, torch.maximum(climb, to_start), rise)
    limit = (config.max_lr / rates.eta.clamp(min=config.min_lr)).log()
    return Search(ell + torch.minimum(rise, (limit - ell).clamp(min=0.0)), energy, agreement, peak, first, norm)


def new_lr_mask(lr_mask: Tensor, v: Vote, a_hat: Tensor, plan: StatePlan, config: Config) -> Tensor:
    """δ after the vote, (arrays, *`StatePlan.row_shape`)."""
    assert v.rows is not None
    assert v.row_weight is not None
    shrinkage = plan.columns / (plan.columns + ROW_SHRINKAGE)
    new_mask = lr_mask + config.lr_mask_gain * (v.rows - to_device(a_hat, lr_mask.device)) * shrinkage
    return torch.where(spread(v.counts, lr_mask) & (v.row_weight > 0), new_mask.clamp(-ROW_LIMIT, ROW_LIMIT), lr_mask)
