"""The rate search and the rates (docs/algorithm.md, sections 5.6 and 5.8).

Nothing waits for a device.  Rates are 0-d float32 tensors, formed once per call, group and device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from automagic_core import Config, StatePlan
from automagic_core.config.constants import ROW_LIMIT, ROW_SHRINKAGE
from automagic_torch.arrays.means import Means
from automagic_torch.arrays.stacked import spread, to_device


def starting_rate(lr: float | Tensor, device: torch.device) -> Tensor:
    """η₀ as 0-d float32."""
    if isinstance(lr, Tensor):
        return to_device(lr.detach().reshape(()).float(), device)
    return torch.full((), float(lr), dtype=torch.float32, device=device)


class Rates(NamedTuple):
    """The rates that all arrays of a group on one device share, 0-d float32."""

    eta: Tensor
    """η: η₀ with the ramp of the warm-up."""
    ell: Tensor
    """ℓ before this step."""
    array: Tensor
    """η̂."""
    min_lr: float
    max_lr: float

    def rows(self, delta: Tensor | None, kappa: Tensor | float) -> Tensor:
        """ηᵢ of every row, (arrays, *`StatePlan.row_shape`); 0-d for arrays without row states.

        Args:
            delta: `lr_mask` before this step, or None.
            kappa: the spatial factor κ.
        """
        exponent = self.ell if delta is None else self.ell + delta
        return _limited(self.eta * kappa, exponent, self.min_lr, self.max_lr)


def rates(lr: float | Tensor, lr_scale: Tensor, step: int, config: Config, device: torch.device) -> Rates:
    """The shared rates at step t."""
    eta = starting_rate(lr, device)
    ell = to_device(lr_scale, device)
    if step <= config.warmup_steps:
        eta = eta * (step / config.warmup_steps)
    array = _limited(eta, ell, config.min_lr, config.max_lr)
    return Rates(eta, ell, array, config.min_lr, config.max_lr)


def _limited(rate: Tensor, found: Tensor, min_lr: float, max_lr: float) -> Tensor:
    """rate · exp(found).  The limits bound what is found, never the rate that was asked for."""
    return (found.exp() * rate).clamp(rate.clamp(max=min_lr), rate.clamp(min=max_lr))


class Vote(NamedTuple):
    """The votes of stacked arrays: how far gradients agree in sign with the last ones."""

    rows: Tensor | None
    """aᵢ, (arrays, *`StatePlan.row_shape`); None for arrays without rows."""
    row_weight: Tensor | None
    """Σⱼ |gᵢⱼ|."""
    array: Tensor
    """ā, (arrays,); 0 for an array that does not count."""
    counts: Tensor
    """(arrays,) bool: whether the array takes part in the pooled vote."""
    size: int
    """Elements of one array."""


def vote(g: Tensor, last_signs: Tensor, took_a_step: Tensor, means: Means) -> Vote:
    """The vote of stacked arrays at step t ≥ 2.

    Args:
        g: the gradients after the stages, float32, (arrays, *`StatePlan.shape`).
        last_signs: the signs of the last gradients, −1 or 1, in the shape of g.
        took_a_step: (arrays,) bool: the array has taken an earlier step and is not skipped now.
        means: forms sums over rows and arrays.
    """
    plan = means.plan
    weight = g.abs()
    # |g| · vote: g times the last sign is positive where the two agree.
    votes = g * last_signs
    rows = row_weight = None
    if plan.has_lr_mask:
        weight, votes = means.row_sums(weight, votes)
        row_weight, rows = weight, votes / weight
    total, agreed = means.sums(weight, votes, of_rows=plan.has_lr_mask)
    counts = took_a_step & (total > 0)
    array = (agreed / total).masked_fill_(~counts, 0.0)
    return Vote(rows, row_weight, array, counts, plan.size)


def pooled(votes: Sequence[Vote], device: torch.device) -> tuple[Tensor, Tensor]:
    """â of a group, and whether any array votes, both 0-d on `device`."""
    # For every batch Σ size · ā and Σ size, over the arrays that vote.
    sums = [to_device(torch.stack([v.array, v.counts.float()]).sum(1) * v.size, device) for v in votes]
    total, size = torch.stack(sums).sum(0)
    return total / size, size > 0


def new_lr_scale(lr_scale: Tensor, a_hat: Tensor, any_counts: Tensor, lr: float | Tensor, config: Config) -> Tensor:
    """ℓ after the vote."""
    eta0 = starting_rate(lr, lr_scale.device).clamp(min=config.min_lr)
    limit = (config.max_lr / eta0).log().clamp(min=0.0)
    raised = torch.minimum((lr_scale + config.lr_mask_gain * a_hat).clamp(min=0.0), limit)
    return torch.where(any_counts, raised, lr_scale)


def new_lr_mask(lr_mask: Tensor, v: Vote, a_hat: Tensor, plan: StatePlan, config: Config) -> Tensor:
    """δ after the vote, (arrays, *`StatePlan.row_shape`)."""
    assert v.rows is not None
    assert v.row_weight is not None
    shrinkage = plan.columns / (plan.columns + ROW_SHRINKAGE)
    new_mask = lr_mask + config.lr_mask_gain * (v.rows - to_device(a_hat, lr_mask.device)) * shrinkage
    return torch.where(spread(v.counts, lr_mask) & (v.row_weight > 0), new_mask.clamp(-ROW_LIMIT, ROW_LIMIT), lr_mask)
