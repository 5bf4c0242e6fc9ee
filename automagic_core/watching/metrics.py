"""Statistics of an optimizer for dashboards: the same names and the same arithmetic for both frameworks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from automagic_core.config.config import Config
from automagic_core.config.constants import SPATIAL_FLOOR, SPATIAL_LIMITS

STAGES = ("clip_by_percentile", "suppress_edges", "suppress_high_frequencies", "encourage_low_rank")
"""The stages of section 4 in their order."""

RATE, RATE_FACTOR, TORQUE = "rate", "rate_factor", "torque/mean"
ENERGY_REMOVED, EFFECTIVE_RANK = "energy_removed", "effective_rank"
SKIPPED_STEPS, STATE_BYTES = "skipped_steps", "state_bytes"


class NextStep(NamedTuple):
    """What decides the rates of step t besides the states (section 5).

    Attributes:
        lr: η₀, `lr` or what the schedule gives for t.
        step: t, from 1.
        warmup_steps, min_lr, max_lr: fields of `Config`.
    """

    lr: float
    step: int
    warmup_steps: int
    min_lr: float
    max_lr: float

    @staticmethod
    def of(config: Config, lr: float | Callable[[int], Any], steps_taken: int) -> NextStep:
        """The step after `steps_taken`.

        Args:
            config: gives the warm-up and the limits.
            lr: η₀, or a schedule, which is called with t − 1.
            steps_taken: t − 1.
        """
        now = lr(steps_taken) if callable(lr) else lr
        return NextStep(float(now), steps_taken + 1, config.warmup_steps, config.min_lr, config.max_lr)


class ArrayFacts(NamedTuple):
    """What is read of one array's states.

    Attributes:
        size: its number of elements.
        lr_scale: ℓ, which it shares with others.
        lr_mask: δ, one value for each row, any shape; None where it has none.
        spatial_variance: likewise.
        torque_mean: τ̄ of its last step; 1 before the first, and where torque is off.
        skipped_steps: for gradients that were not finite.
        next_step: None where the learning rate is not known.
    """

    size: int
    lr_scale: float
    lr_mask: np.ndarray | None
    spatial_variance: np.ndarray | None
    torque_mean: float
    skipped_steps: int
    next_step: NextStep | None


def metrics(
    arrays: Sequence[ArrayFacts],
    energy_removed: Mapping[str, float],
    effective_ranks: Mapping[str, float],
    state_bytes: int,
) -> dict[str, float]:
    """One flat dictionary of floats.

    Args:
        arrays: every array that has states.
        energy_removed: by stage, 1 − Σ g² after it / Σ g² before it.
        effective_ranks: by the name of the LoRA array.
        state_bytes: bytes held.

    Returns:
        Those that exist of

        - ``rate/mean``, ``rate/min``, ``rate/max``: ηᵢ of section 5 over all rows of all arrays, in the step that comes
          next: votes and variances of a step enter only the rates of the following one.  A row counts once; so does an
          array all of whose elements have one rate (fewer than two axes, or neither `lr_mask` nor `spatial_variance`);
        - ``rate_factor/mean``, …/min, …/max: exp(ℓ + δᵢ) of the same rows, what the votes made of the rate;
        - ``torque/mean``: τ, in (0, 1), over all elements of all arrays at their last steps;
        - ``energy_removed/<stage>``: of the last step; negative where the stage added energy;
        - ``effective_rank/<name>``;
        - ``skipped_steps``, summed over arrays; ``state_bytes``.
    """
    found: dict[str, float] = {}
    found |= _spread(RATE, [row_rates(array, array.next_step) for array in arrays if array.next_step is not None])
    found |= _spread(RATE_FACTOR, [row_factors(array) for array in arrays])
    # A step leaves τ̄ < 1: exactly 1 is an array without a step, or without torque.
    turned = [array for array in arrays if array.torque_mean != 1 and array.size > 0]
    if turned:
        weights = [array.size for array in turned]
        found[TORQUE] = float(np.average([array.torque_mean for array in turned], weights=weights))
    found |= {f"{ENERGY_REMOVED}/{stage}": float(energy_removed[stage]) for stage in STAGES if stage in energy_removed}
    found |= {f"{EFFECTIVE_RANK}/{name}": float(rank) for name, rank in effective_ranks.items()}
    found[SKIPPED_STEPS] = float(sum(array.skipped_steps for array in arrays))
    found[STATE_BYTES] = float(state_bytes)
    return found


def row_factors(array: ArrayFacts) -> np.ndarray:
    """exp(ℓ + δᵢ), one for each row or one for the array, float64, 1-D."""
    if array.lr_mask is not None:
        return np.exp(array.lr_scale + _flat(array.lr_mask))
    rows = 1 if array.spatial_variance is None else array.spatial_variance.size
    return np.full(rows, math.exp(array.lr_scale))


def row_rates(array: ArrayFacts, at: NextStep) -> np.ndarray:
    """ηᵢ of section 5 at a step, with its ramp and its limits, shaped as `row_factors`."""
    eta = at.lr * (min(1.0, at.step / at.warmup_steps) if at.warmup_steps > 0 else 1.0)
    factors = row_factors(array)
    if eta == 0:
        return np.zeros_like(factors)
    low = min(at.min_lr, eta) if at.step <= at.warmup_steps else at.min_lr
    kappa = 1.0 if array.spatial_variance is None else spatial_factors(_flat(array.spatial_variance))
    return np.clip(eta * factors * kappa, low, at.max_lr)


def spatial_factors(variance: np.ndarray) -> np.ndarray:
    """κᵢ of section 5 from `spatial_variance`, 1 where its mean is 0."""
    mean = variance.mean() if variance.size else 0.0
    if mean == 0:
        return np.ones_like(variance)
    return np.clip(np.sqrt(mean / np.maximum(variance, SPATIAL_FLOOR)), *SPATIAL_LIMITS)


def effective_ranks(grams: np.ndarray) -> np.ndarray:
    """exp of the entropy of the normalised singular values: between 1 and their number.

    Args:
        grams: W Wᵀ of matrices W with the shorter side first, (matrices, side, side).

    Returns:
        float64 (matrices,); 0 for a matrix that is zero or not finite.
    """
    grams = np.asarray(grams, np.float64)
    usable = np.isfinite(grams).all(axis=(1, 2))
    values = np.linalg.eigvalsh(np.where(usable[:, None, None], grams, 0.0))
    sigma = np.sqrt(np.maximum(values, 0.0))
    total = sigma.sum(axis=1, keepdims=True)
    share = sigma / np.where(total > 0, total, 1.0)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1)
    return np.where(total[:, 0] > 0, np.exp(entropy), 0.0)


def _spread(name: str, of_arrays: Iterable[np.ndarray]) -> dict[str, float]:
    values = np.concatenate([np.zeros(0), *of_arrays])
    if not values.size:
        return {}
    return {f"{name}/{how}": float(getattr(values, how)()) for how in ("mean", "min", "max")}


def _flat(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(-1)
