"""The rate search: rates, votes of signs and the walk (`docs/algorithm.md`, sections 5.6 and 5.8).

References: Automagic (ai-toolkit); Ivgi et al., *DoG*, arXiv 2302.12022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Config, StatePlan
from automagic_core.config import constants
from automagic_optax.arrays.means import accurate_sum, accurate_total
from automagic_optax.cameamp.states import Search

f32 = np.float32
_LEAST = float(np.finfo(np.float32).tiny)


class Rates(NamedTuple):
    """What the learning rates of all arrays share in one step.

    Attributes:
        eta: η, the constant rate or the schedule's value, with the ramp where there is one.
        low, high: the limits of what is found.
        log_rate_scale: ℓ.
    """

    eta: jax.Array
    low: jax.Array
    high: jax.Array
    log_rate_scale: jax.Array

    def array(self) -> jax.Array:
        """η̂, the rate of the array, which weight decay uses."""
        return self._limited(self.eta, self.log_rate_scale)

    def rows(self, lr_mask: jax.Array | None, kappa: jax.Array | None) -> jax.Array:
        """ηᵢ, the rate of each row: a scalar where the array has neither `lr_mask` nor spatial factor."""
        rate = self.eta if kappa is None else self.eta * kappa
        return self._limited(rate, self.log_rate_scale if lr_mask is None else self.log_rate_scale + lr_mask)

    def _limited(self, rate: jax.Array, found: jax.Array) -> jax.Array:
        # The limits bound what is found, never the rate that was asked for.
        return jnp.clip(rate * jnp.exp(found), jnp.minimum(self.low, rate), jnp.maximum(self.high, rate))


def rates(learning_rate: Any, log_rate_scale: jax.Array, step: jax.Array, config: Config) -> Rates:
    """The rates of step t.

    Args:
        learning_rate: a number, a traced scalar, or a schedule, which is called with t − 1.
        log_rate_scale: ℓ before this step.
        step: t.
        config: gives the ramp and the limits.
    """
    # An array of shape (1,) would give a scalar parameter that shape.
    eta = _float32(learning_rate(step - 1) if callable(learning_rate) else learning_rate).reshape(())
    eta = jnp.where((eta >= 0) & (eta < f32(math.inf)), eta, f32(0))
    if config.ramp_steps > 0:
        eta = eta * jnp.minimum(f32(1), step.astype(jnp.float32) / f32(config.ramp_steps))
    if config.searches:
        start = f32(math.log(constants.SEARCH_START)) - jnp.log(jnp.maximum(eta, f32(_LEAST)))
        log_rate_scale = jnp.where(step == 1, jnp.minimum(log_rate_scale, start), log_rate_scale)
    return Rates(eta, _float32(config.min_lr), _float32(config.max_lr), log_rate_scale)


class Votes(NamedTuple):
    """The votes of an array on the learning rate.

    Attributes:
        rows: aᵢ, in [−1, 1], a row statistic; None where the array has no `lr_mask`.
        rows_count: whether each row votes; None likewise.
        mean: ā, the vote of the whole array.
        weight: the array's number of elements if it votes, else 0.
        total: Σ |g|.
    """

    rows: jax.Array | None
    rows_count: jax.Array | None
    mean: jax.Array
    weight: jax.Array
    total: jax.Array


def count_votes(
    rows: dict[str, jax.Array], totals: dict[str, jax.Array], g: jax.Array, exp_avg: jax.Array, plan: StatePlan
) -> None:
    """Counts +1 where gradient and momentum agree in sign and −1 where they do not, weighted by |g|.

    Args:
        rows, totals: get the sums ``"weight"``, of |g|, and ``"agreement"``, of |g| · vote: those of each row where the
            array has an `lr_mask`, else those of the array.
        g: the gradient after stages 1 to 4.
        exp_avg: the momentum before this step.
    """
    found, axes = (rows, plan.column_axes) if plan.has_lr_mask else (totals, None)
    found["weight"] = accurate_sum(jnp.abs(g), axes)
    found["agreement"] = accurate_sum(g * jnp.sign(exp_avg), axes)


def _votes(rows: Mapping[str, jax.Array], totals: Mapping[str, jax.Array], counts: jax.Array, plan: StatePlan) -> Votes:
    """The votes of an array, from the sums of `count_votes`; `counts` says whether there is a momentum."""
    found = rows if plan.has_lr_mask else totals
    total = accurate_sum(found["weight"])
    counts_at_all = counts & (total > 0)
    mean = jnp.where(counts_at_all, accurate_sum(found["agreement"]) / jnp.where(counts_at_all, total, f32(1)), f32(0))
    pool = jnp.where(counts_at_all, f32(plan.size), f32(0))
    if not plan.has_lr_mask:
        return Votes(None, None, mean, pool, total)
    row_counts = counts & (rows["weight"] > 0)
    of_rows = rows["agreement"] / jnp.where(row_counts, rows["weight"], f32(1))
    return Votes(jnp.where(row_counts, of_rows, f32(0)), row_counts, mean, pool, total)


class Evidence(NamedTuple):
    """What an array says to the search in one step, or each array of a batch along a leading axis.

    Attributes:
        vote: its vote; None where it has none.
        moved: its number of elements, or 0 where it is skipped or its gradient is 0; None where it has no `walk`.
        stepped: 1, or 0 where it is skipped; None likewise.
        gradient_square: Σ g², or 0 where it is skipped; None likewise.
    """

    vote: Votes | None
    moved: jax.Array | None
    stepped: jax.Array | None
    gradient_square: jax.Array | None


def evidence(
    rows: Mapping[str, jax.Array],
    totals: Mapping[str, jax.Array],
    mean_square: jax.Array,
    counts: jax.Array,
    plan: StatePlan,
) -> Evidence:
    """The evidence of an array that is not skipped.

    Args:
        rows, totals: the sums of `count_votes`; without votes the sum ``"weight"`` of |g|.
        mean_square: the mean of g².
        counts: boolean scalar: the array has taken an earlier step.
        plan: says what the array has.
    """
    vote = _votes(rows, totals, counts, plan) if plan.votes else None
    if not plan.has_walk:
        return Evidence(vote, None, None, None)
    weight = totals["weight"] if vote is None else vote.total
    moved = jnp.where(weight > 0, f32(plan.size), f32(0))
    return Evidence(vote, moved, jnp.ones([], jnp.float32), f32(plan.size) * mean_square)


def kept(search: Search, config: Config) -> jax.Array:
    """What is kept of E and of every walk before a step: 0 in the climb, else 1."""
    after = search.peak_agreement < 0
    return jnp.where(after, f32(1), f32(0)) if config.climbs else jnp.ones([], jnp.float32)


def walk_square(walk: jax.Array) -> jax.Array:
    """Σ walk² of one array."""
    return accurate_sum(jnp.square(walk))


def signed_sum(
    rows: dict[str, jax.Array], totals: dict[str, jax.Array], steps: jax.Array, signs: jax.Array, plan: StatePlan
) -> None:
    """Sums the steps ηᵢ · d times their signs: ``"walk"`` of each row, or of an array without rows."""
    found, axes = (totals, None) if plan.row_axis is None else (rows, plan.column_axes)
    found["walk"] = accurate_sum(jnp.where(signs > 0, steps, -steps), axes)


def searched(
    search: Search,
    found: Sequence[Evidence],
    walk_squares: Sequence[jax.Array],
    rates: Rates,
    step: jax.Array,
    config: Config,
) -> tuple[Search, jax.Array]:
    """The search after step t, and the pooled vote â.  They enter the rates of the next step.

    Args:
        search: before the step.
        found: the evidence of each array or batch.
        walk_squares: Σ walk² of every array after the step, in any number of parts.
        rates: those of this step.
        step: t.
        config: hyperparameters.
    """
    warming = step <= config.warmup_steps
    keep = kept(search, config)
    _, energy, agreement, peak, first, norm = search
    ell = rates.log_rate_scale
    pooled = jnp.zeros([], jnp.float32)
    votes = [evidence.vote for evidence in found if evidence.vote is not None]
    if votes:
        size = accurate_total([vote.weight for vote in votes])
        pooled = accurate_total([vote.weight * vote.mean for vote in votes]) / jnp.where(size > 0, size, f32(1))
        averaged = f32(constants.AGREEMENT_DECAY) * agreement + f32(1 - constants.AGREEMENT_DECAY) * pooled
        voting = warming & (step >= 2) & (size > 0)
        # The first vote enters whole.
        agreement = jnp.where(voting, jnp.where(agreement == 0, pooled, averaged), agreement)
    elements = [evidence.moved for evidence in found if evidence.moved is not None]
    if elements:
        n = accurate_total(elements)
        of_step = jnp.square(rates.array()) * n
        energy = jnp.where(warming, keep * energy + of_step, energy)
        # ρ², and no quotient 0 / 0, nor its derivative
        square = accurate_total(walk_squares) / jnp.where(energy > 0, energy, f32(1))
        counts = warming & (of_step > 0)
        # (ρ / s)²
        beyond = square / jnp.square(_float32(config.straightness))
        long = f32(constants.SHORT_STEP) * step.astype(jnp.float32) * of_step >= energy
        first, norm = _norms(search, found, step, warming & (n > 0))
        growth = jnp.where(first > 0, norm / jnp.where(first > 0, first, f32(1)), f32(0))
        above = beyond / jnp.square(jnp.clip(growth, f32(constants.LEAST_GROWTH), f32(1)))
        rise = f32(0.5) * jnp.log(jnp.where(above > 1, above, f32(1)))
        rise = _float32(config.search_gain) * jnp.minimum(rise, f32(constants.LARGEST_RISE))
        rise = rise * jnp.clip(f32(constants.LARGEST_GROWTH) - growth, f32(0), f32(1))
        rise = jnp.where(long, rise, f32(0))
        if config.climbs:
            of_agreement, at_most = map(f32, constants.RISE_BY_VOTES)
            least = jnp.maximum(f32(-constants.AGREES) * jnp.abs(peak), _float32(config.agreement_floor))
            doubted = jnp.minimum(agreement, f32(constants.DOUBT) * agreement)
            believed = jnp.where(beyond > 1, agreement, doubted)
            rise = jnp.minimum(rise, jnp.clip(of_agreement * (believed - least), f32(0), at_most))
            climbing, asks = peak >= 0, step >= constants.CLIMB_STEPS
            peak = jnp.where(climbing & counts & asks, jnp.maximum(peak, agreement), peak)
            most, of_peak = map(f32, constants.STEP_BACK)
            size = jnp.maximum(jnp.abs(peak), f32(constants.LEAST_PEAK))
            back = jnp.minimum(of_peak * size, most)
            agrees = (agreement > 0) & (agreement >= f32(constants.AGREES) * size)
            ends = climbing & counts & asks & (agreement != 0) & ~agrees
            again = ~climbing & long & asks & agrees & (agreement >= f32(constants.AGREES_AGAIN))
            to_start = f32(math.log(constants.SEARCH_START)) - jnp.log(jnp.maximum(rates.array(), f32(_LEAST)))
            rise = jnp.where(climbing, jnp.where(ends, jnp.clip(to_start, -back, f32(0)), f32(0)), rise)
            fades = (agreement / size - f32(constants.AGREES)) / f32(1 - constants.AGREES)
            climb = f32(constants.CLIMB) * jnp.where(asks, jnp.clip(fades, f32(0), f32(1)), f32(1))
            climb = jnp.maximum(to_start, climb + jnp.where(again, back, f32(0)))
            climbs = again | (climbing & (~asks | agrees))
            rise = jnp.where(climbs, climb, rise)
            peak = jnp.where(ends, -size, jnp.where(climbs & counts & asks, size, peak))
        # A search has no ramp, so η is η₀.
        limit = jnp.log(_float32(config.max_lr) / jnp.maximum(rates.eta, _float32(config.min_lr)))
        ell = jnp.where(counts, ell + jnp.minimum(rise, jnp.maximum(limit - ell, f32(0))), ell)
    return Search(ell, energy, agreement, peak, first, norm), pooled


def _norms(
    search: Search, found: Sequence[Evidence], step: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """F and G after step t; they stay where no array moves."""
    _, _, _, _, first, norm = search
    squares = [evidence.gradient_square for evidence in found if evidence.gradient_square is not None]
    of_step = jnp.sqrt(accurate_total(squares))
    begins = step < constants.CLIMB_STEPS
    mean = jnp.where(first > 0, first + (of_step - first) / step.astype(jnp.float32), of_step)
    averaged = f32(constants.AGREEMENT_DECAY) * norm + f32(1 - constants.AGREEMENT_DECAY) * of_step
    new = jnp.where(begins, mean, averaged)
    return jnp.where(counts & begins, mean, first), jnp.where(counts, new, norm)


def new_masks(
    masks: Sequence[jax.Array | None],
    found: Sequence[Evidence],
    plans: Sequence[StatePlan],
    pooled: jax.Array,
    step: jax.Array,
    config: Config,
) -> list[jax.Array | None]:
    """Every δ after the votes of step t.  They enter the rates of the next step.

    Args:
        masks: δ of each array or batch.
        found: their evidence.
        plans: the plan of each array, or of one array of each batch.
        pooled: â.
        step: t.
        config: hyperparameters.
    """
    voting = (step >= 2) & (step <= config.warmup_steps)

    def new_mask(mask: jax.Array | None, vote: Votes | None, plan: StatePlan) -> jax.Array | None:
        if mask is None or vote is None or vote.rows is None or vote.rows_count is None:
            return mask
        share = f32(plan.columns / (plan.columns + constants.ROW_SHRINKAGE))
        new = mask + _float32(config.lr_mask_gain) * (vote.rows - pooled) * share
        new = jnp.clip(new, -f32(constants.ROW_LIMIT), f32(constants.ROW_LIMIT))
        return jnp.where(voting & vote.rows_count, new, mask)

    return [new_mask(mask, evidence.vote, plan) for mask, evidence, plan in zip(masks, found, plans, strict=True)]


def _float32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
