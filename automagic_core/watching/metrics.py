"""Statistics of an optimizer for dashboards, the same in both frameworks (docs/algorithm.md, section 13)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from automagic_core.config.config import Config
from automagic_core.config.constants import SEARCH_START, SPATIAL_FLOOR, SPATIAL_LIMITS, SPATIAL_NOISE

STAGES = ("clip_by_percentile", "suppress_edges", "suppress_high_frequencies", "encourage_low_rank")
"""The gradient stages in their order (section 4)."""

LEARNING_RATE, RATE, RATE_FACTOR, TORQUE = "learning_rate", "rate", "rate_factor", "torque/mean"
ENERGY_REMOVED, EFFECTIVE_RANK = "energy_removed", "effective_rank"
SKIPPED_STEPS, STATE_BYTES = "skipped_steps", "state_bytes"


class NextStep(NamedTuple):
    """The numbers that decide the rates of step t, besides the states (section 5.6).

    Attributes:
        lr: η₀, `lr` or what the schedule gives for t.
        step: t, from 1.
        ramp_steps, min_lr, max_lr: of `Config`.
        start: the most that η₀ · exp ℓ can be; infinite but at the first step of a search.
    """

    lr: float
    step: int
    ramp_steps: int
    min_lr: float
    max_lr: float
    start: float = math.inf

    @staticmethod
    def of(config: Config, lr: float | Callable[[int], Any], steps_taken: int) -> NextStep:
        """Describes the step after `steps_taken`.

        Args:
            config: gives the warm-up and the limits.
            lr: η₀, or a schedule, which is called with t − 1.
            steps_taken: t − 1.
        """
        now = lr(steps_taken) if callable(lr) else lr
        start = SEARCH_START if config.searches and steps_taken == 0 else math.inf
        return NextStep(float(now), steps_taken + 1, config.ramp_steps, config.min_lr, config.max_lr, start)


class ArrayFacts(NamedTuple):
    """The states of one array that metrics read.

    Attributes:
        size: number of elements.
        log_rate_scale: ℓ of its group.
        lr_mask, spatial_variance: one value for each row, in any shape; None where the array has none.
        torque_mean: τ̄ of its last step; 1 before the first step, and where torque is off.
        skipped_steps: the steps in which it was skipped.
        next_step: the next step; None where the learning rate is not known.
    """

    size: int
    log_rate_scale: float
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
    learning_rate: float | None = None,
) -> dict[str, float]:
    """Puts all statistics into one flat dictionary.

    Args:
        arrays: every array that has states.
        energy_removed: by stage, 1 − Σ g² after it / Σ g² before it.
        effective_ranks: by the name of the adapter.
        state_bytes: bytes of all states.
        learning_rate: η̂ of the last step, the highest of all groups; None where it is not known.

    Returns:
        Those of these that exist:

        - ``learning_rate``: η̂ (section 5.6) of the last step, the rate in force;
        - ``rate/mean``, ``rate/min``, ``rate/max``: ηᵢ (section 5.6) of the next step, over all rows of all arrays.  An
          array whose elements all have one rate counts as one row;
        - ``rate_factor/mean``, …/min, …/max: exp(ℓ + δᵢ) of the same rows: the factor that the search found;
        - ``torque/mean``: the mean τ, in (0, 1), over all elements at the last step of their array;
        - ``energy_removed/<stage>``: of the last step; negative where the stage adds energy, as stage 4 mostly does;
        - ``effective_rank/<name>``;
        - ``skipped_steps``, summed over arrays; ``state_bytes``.
    """
    found = {} if learning_rate is None else {LEARNING_RATE: float(learning_rate)}
    found |= _spread(RATE, [row_rates(array, array.next_step) for array in arrays if array.next_step is not None])
    found |= _spread(RATE_FACTOR, [row_factors(array) for array in arrays])
    # After a step τ̄ < 1, so an array with exactly 1 took no step or has no torque.
    with_torque = [array for array in arrays if array.torque_mean != 1 and array.size > 0]
    if with_torque:
        weights = [array.size for array in with_torque]
        found[TORQUE] = float(np.average([array.torque_mean for array in with_torque], weights=weights))
    found |= {f"{ENERGY_REMOVED}/{stage}": float(energy_removed[stage]) for stage in STAGES if stage in energy_removed}
    found |= {f"{EFFECTIVE_RANK}/{name}": float(rank) for name, rank in effective_ranks.items()}
    found[SKIPPED_STEPS] = float(sum(array.skipped_steps for array in arrays))
    found[STATE_BYTES] = float(state_bytes)
    return found


def row_factors(array: ArrayFacts) -> np.ndarray:
    """exp(ℓ + δᵢ) of every row, or one value for the array: float64, 1-D."""
    if array.lr_mask is not None:
        return np.exp(array.log_rate_scale + _flat(array.lr_mask))
    rows = 1 if array.spatial_variance is None else array.spatial_variance.size
    return np.full(rows, math.exp(array.log_rate_scale))


def row_rates(array: ArrayFacts, at: NextStep) -> np.ndarray:
    """ηᵢ of a step (section 5.6), in the shape of `row_factors`."""
    eta = at.lr * (min(1.0, at.step / at.ramp_steps) if at.ramp_steps > 0 else 1.0)
    factors = row_factors(array) * min(1.0, at.start / max(eta, 1e-30))
    kappa = 1.0 if array.spatial_variance is None else spatial_factors(_flat(array.spatial_variance))
    rates = eta * kappa
    return np.clip(rates * factors, np.minimum(at.min_lr, rates), np.maximum(at.max_lr, rates))


def spatial_factors(variance: np.ndarray) -> np.ndarray:
    """κᵢ from `spatial_variance` (section 5.5)."""
    mean = variance.mean() if variance.size else 0.0
    if mean <= SPATIAL_NOISE:
        return np.ones_like(variance)
    factors: np.ndarray = np.clip(np.sqrt(mean / np.maximum(variance, SPATIAL_FLOOR)), *SPATIAL_LIMITS)
    return factors


def effective_ranks(grams: np.ndarray) -> np.ndarray:
    """The effective ranks of matrices: the exponential of the entropy of their normalized singular values.

    Args:
        grams: W Wᵀ of every matrix W, with the shorter side first: (matrices, side, side).

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
