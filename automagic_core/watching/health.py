"""Judges whether a run is healthy, from its losses, skipped steps and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from automagic_core.watching.loss_trend import MIN_LOSSES, loss_trend
from automagic_core.watching.monitor import MEMORY_LIMIT
from automagic_core.watching.suggestions import ISSUES, RunRates, suggestion

SKIPPED_WARNING, SKIPPED_CRITICAL = 0.01, 0.1
"""Shares of skipped steps.  A loss scale that adapts causes a few; a tenth of all means a broken run."""


class TrainingHealth(TypedDict):
    """The result of a health check.

    Keys:
        status: ``"healthy"``, ``"warning"`` or ``"critical"``.
        issues: names from `automagic_core.ISSUES`, the most urgent first.
        suggestions: sentences for each issue, in the same order; the last one says if there were too few losses.
    """

    status: str
    issues: list[str]
    suggestions: list[str]


class OptimizerFacts(NamedTuple):
    """The facts about an optimizer that a health check needs.

    Attributes:
        skipped, taken: numbers of steps of single arrays that were skipped and taken.
        memory_use: the part of the device's memory that is in use; None where it is not known.
        rates: its learning rate; None where it is not known.
    """

    skipped: int
    taken: int
    memory_use: float | None
    rates: RunRates | None


def training_health(
    losses: Sequence[float] | np.ndarray, facts: OptimizerFacts, threshold_ratio: float
) -> TrainingHealth:
    """Judges a run.

    | issue | found where | status |
    |---|---|---|
    | `divergence` | a loss is not finite, or the loss rises by more than `threshold_ratio` | critical |
    | `memory_pressure` | more than 90 % of the device's memory is in use | warning |
    | `skipped_steps` | over 1 % of the arrays' steps were skipped, since their states were made | warning |
    | | over 10 % were skipped | critical |
    | `convergence_stall` | the loss falls by less than `threshold_ratio` | warning |

    A rise or a fall is that from the first half of `losses` to the second, relative to the first.
    `automagic_core.loss_trend` tells it from noise.  Where noise could hide a large enough fall, there is no stall.

    Args:
        losses: one for each step, in order.
        facts: about the optimizer.
        threshold_ratio: the least change of the loss that counts.  The default of the public functions, 0.1, suits a
            whole run; 0.01 suits its last few hundred steps.

    Raises:
        ValueError: a `threshold_ratio` that is not in (0, 1).
    """
    if not 0 < threshold_ratio < 1:
        raise ValueError(f"threshold_ratio = {threshold_ratio!r} is not valid; valid: a number in (0, 1)")
    values = np.asarray(losses, np.float64).reshape(-1)
    trend = loss_trend(values)
    found: dict[str, str] = {}
    critical = False

    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        found["divergence"] = f"{wrong} of {values.size} losses are not finite."
    elif trend is not None and trend.rises(threshold_ratio):
        found["divergence"] = f"The loss rises: {trend}."
    elif trend is not None and trend.falls_less_than(threshold_ratio):
        found["convergence_stall"] = f"The loss falls by less than {threshold_ratio:.3g} of itself: {trend}."
    critical |= "divergence" in found

    if facts.memory_use is not None and facts.memory_use > MEMORY_LIMIT:
        found["memory_pressure"] = f"{facts.memory_use:.0%} of the device's memory is in use."
    steps = facts.skipped + facts.taken
    skipped_part = facts.skipped / max(steps, 1)
    if skipped_part > SKIPPED_WARNING:
        found["skipped_steps"] = f"{facts.skipped:,} of {steps:,} steps of single arrays were skipped."
        critical |= skipped_part > SKIPPED_CRITICAL

    issues = [issue for issue in ISSUES if issue in found]
    suggestions = [f"{found[issue]} {suggestion(issue, facts.rates)['text']}" for issue in issues]
    if values.size < MIN_LOSSES:
        suggestions.append(f"{values.size} losses are too few to judge: at least {MIN_LOSSES} are needed.")
    status = "critical" if critical else "warning" if issues else "healthy"
    return TrainingHealth(status=status, issues=issues, suggestions=suggestions)
