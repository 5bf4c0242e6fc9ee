"""The rate search: rates and votes of gradient signs (`docs/algorithm.md`, sections 5.6 and 5.8).

Reference: Automagic (ai-toolkit).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Config, StatePlan
from automagic_core.config import constants
from automagic_optax.arrays.means import accurate_sum, accurate_total

f32 = np.float32


class Rates(NamedTuple):
    """What the learning rates of all arrays share in one step.

    Attributes:
        initial: η₀, the constant rate or the schedule's value.
        ramped: η, the rate after the warm-up's ramp.
        low, high: the limits of what is found.
        lr_scale: ℓ.
    """

    initial: jax.Array
    ramped: jax.Array
    low: jax.Array
    high: jax.Array
    lr_scale: jax.Array

    def array(self) -> jax.Array:
        """η̂, the rate of the array, which weight decay uses."""
        return self._limited(self.ramped, self.lr_scale)

    def rows(self, lr_mask: jax.Array | None, kappa: jax.Array | None) -> jax.Array:
        """ηᵢ, the rate of each row: a scalar where the array has neither `lr_mask` nor spatial factor."""
        rate = self.ramped if kappa is None else self.ramped * kappa
        return self._limited(rate, self.lr_scale if lr_mask is None else self.lr_scale + lr_mask)

    def _limited(self, rate: jax.Array, found: jax.Array) -> jax.Array:
        # The limits bound what is found, never the rate that was asked for.
        return jnp.clip(rate * jnp.exp(found), jnp.minimum(self.low, rate), jnp.maximum(self.high, rate))


def rates(learning_rate: Any, lr_scale: jax.Array, step: jax.Array, config: Config) -> Rates:
    """The rates of step t.

    Args:
        learning_rate: a number, a traced scalar, or a schedule, which is called with t − 1.
        lr_scale: ℓ before this step's votes.
        step: t.
        config: gives the warm-up and the limits.
    """
    initial = jnp.asarray(learning_rate(step - 1) if callable(learning_rate) else learning_rate, jnp.float32)
    ramped = initial
    if config.warmup_steps > 0:
        ramped = initial * jnp.minimum(f32(1), step.astype(jnp.float32) / f32(config.warmup_steps))
    low, high = jnp.asarray(config.min_lr, jnp.float32), jnp.asarray(config.max_lr, jnp.float32)
    return Rates(initial, ramped, low, high, lr_scale)


class Votes(NamedTuple):
    """The votes of an array on the learning rate.

    Attributes:
        rows: aᵢ, in [−1, 1], a row statistic; None where the array has no `lr_mask`.
        rows_count: whether each row votes; None likewise.
        mean: ā, the vote of the whole array.
        weight: the array's number of elements if it votes, else 0.
    """

    rows: jax.Array | None
    rows_count: jax.Array | None
    mean: jax.Array
    weight: jax.Array


def count_array(g: jax.Array, last_negative: jax.Array, counts: jax.Array, plan: StatePlan) -> Votes:
    """Counts +1 where successive gradients agree in sign and −1 where they do not, weighted by |g|.

    Args:
        g: the gradient after stages 1 to 4.
        last_negative: the last gradient's sign bits as booleans.
        counts: boolean scalar: the array has a last gradient.
    """
    weight = jnp.abs(g)
    agreement = jnp.where(last_negative, -g, g)  # |g| · vote, and 0 where g = 0
    # The array's sums are sums over those of its rows, so the data is read once.
    row_total = accurate_sum(weight, plan.column_axes) if plan.has_lr_mask else weight
    row_agreement = accurate_sum(agreement, plan.column_axes) if plan.has_lr_mask else agreement
    total = accurate_sum(row_total)
    counts_at_all = counts & (total > 0)
    mean = jnp.where(counts_at_all, accurate_sum(row_agreement) / jnp.where(counts_at_all, total, f32(1)), f32(0))
    pool = jnp.where(counts_at_all, f32(plan.size), f32(0))
    if not plan.has_lr_mask:
        return Votes(None, None, mean, pool)
    row_counts = counts & (row_total > 0)
    rows = row_agreement / jnp.where(row_counts, row_total, f32(1))
    return Votes(jnp.where(row_counts, rows, f32(0)), row_counts, mean, pool)


def count_votes(
    votes: Sequence[Votes | None],
    masks: Sequence[jax.Array | None],
    plans: Sequence[StatePlan],
    rates: Rates,
    voting: jax.Array,
    config: Config,
) -> tuple[jax.Array, list[jax.Array | None]]:
    """ℓ and every δ after the votes of this step.  They enter the rates of the next step.

    Args:
        votes: the votes of each array, or of each batch with a leading axis; None for arrays that never vote.
        masks: δ, likewise.
        plans: the plan of each array, or of one array of each batch.
        voting: boolean scalar, 2 ≤ t ≤ `warmup_steps`.
    """
    cast = [vote for vote in votes if vote is not None]
    if not cast:
        return rates.lr_scale, list(masks)
    gain = f32(config.lr_mask_gain)
    total = accurate_total([vote.weight for vote in cast])
    pooled = accurate_total([vote.weight * vote.mean for vote in cast]) / jnp.where(total > 0, total, f32(1))
    limit = jnp.maximum(f32(0), jnp.log(rates.high / jnp.maximum(rates.initial, f32(config.min_lr))))
    lr_scale = jnp.clip(rates.lr_scale + gain * pooled, f32(0), limit)
    lr_scale = jnp.where(voting & (total > 0), lr_scale, rates.lr_scale)

    def new_mask(mask: jax.Array | None, vote: Votes | None, plan: StatePlan) -> jax.Array | None:
        if mask is None or vote is None or vote.rows is None or vote.rows_count is None:
            return mask
        share = f32(plan.columns / (plan.columns + constants.ROW_SHRINKAGE))
        new = mask + gain * (vote.rows - pooled) * share
        new = jnp.clip(new, -f32(constants.ROW_LIMIT), f32(constants.ROW_LIMIT))
        return jnp.where(voting & vote.rows_count, new, mask)

    return lr_scale, [new_mask(*args) for args in zip(masks, votes, plans, strict=True)]
