"""Suggests what to change when a run has a problem."""

from __future__ import annotations

from typing import Any, NamedTuple

from automagic_core.config.config import PROFILES

ISSUES = ("divergence", "memory_pressure", "skipped_steps", "convergence_stall")
"""All problems that a monitor or a health check can find, the most urgent first."""
_FACTOR = 3.0
"""A suggestion raises or lowers a rate by this factor."""


class RunRates(NamedTuple):
    """The present learning rate of a run.

    Attributes:
        lr: η₀, as given or as a scheduler set it; None for a schedule.
        rate: η₀ · exp ℓ within its limits (section 5.6): the rate that the search has found so far.
        min_lr, max_lr: its limits.
        searching: the rate search still goes on.
    """

    lr: float | None
    rate: float
    min_lr: float
    max_lr: float
    searching: bool


def suggestion(issue: str, rates: RunRates | None = None) -> dict[str, Any]:
    """Suggests what to change.

    Args:
        issue: one of `ISSUES`.
        rates: the run's rates.  Without them a problem of the learning rate gets only a text.

    Returns:
        ``"text"``, a sentence or two, and perhaps fields of `Config` with new values, which
        ``Config(**{**config.__dict__, **fields})`` takes.

    Raises:
        ValueError: an unknown issue.
    """
    if issue == "divergence":
        return _lower_rate(rates)
    if issue == "convergence_stall":
        return _raise_rate(rates)
    if issue == "memory_pressure":
        text = (
            "The device's memory is nearly full: make the batch smaller, or make the optimizer anew with these fields "
            "(the form of its states is fixed once they are made)."
        )
        return {"profile": "memory_optimized", "optim_bits": 8, **PROFILES["memory_optimized"], "text": text}
    if issue == "skipped_steps":
        text = (
            "Gradients were not finite and their arrays were skipped: look for bad samples, for a loss that overflows "
            "in half precision (bfloat16 or loss scaling help), and for a norm clipped in front of the optimizer, "
            "which spreads one NaN to all arrays."
        )
        return {"text": text}
    raise ValueError(f"issue = {issue!r} is not one of {', '.join(ISSUES)}")


def _lower_rate(rates: RunRates | None) -> dict[str, Any]:
    back = "Go back to the last good checkpoint"
    if rates is None or rates.rate == 0:
        return {"text": f"{back} and lower lr and max_lr to a third of the rate in use."}
    limit = _rounded(rates.rate / _FACTOR)
    fields = {"max_lr": limit}
    if rates.min_lr > limit:
        fields["min_lr"] = limit
    if rates.lr is not None:
        fields["lr"] = min(max(rates.lr, rates.min_lr), limit)
    schedule = " The schedule must be lowered too, since the limits do not bind it." if rates.lr is None else ""
    return {**fields, "text": f"{back}; the rate was {rates.rate:.2g}: let none exceed {limit:.2g}.{schedule}"}


def _raise_rate(rates: RunRates | None) -> dict[str, Any]:
    if rates is None:
        return {
            "text": "If the loss is not as low as it can get: raise max_lr, and after the warm-up lr too, threefold."
        }
    at_limit = rates.rate >= 0.99 * rates.max_lr
    if rates.searching and not at_limit:
        return {"text": f"The rate is still being searched ({rates.rate:.2g} so far): wait for the end of the warm-up."}
    if rates.searching:
        text = f"The search has reached max_lr = {rates.max_lr:.2g}: raise it, so that the search goes on."
        return {"max_lr": _rounded(_FACTOR * rates.max_lr), "text": text}
    limit = max(rates.max_lr, _rounded(_FACTOR * rates.rate))
    if rates.lr is None or rates.lr == 0:
        text = "If the loss is not as low as it can get: raise the schedule threefold, and max_lr with it."
        return {"max_lr": limit, "text": text}
    lr = max(_rounded(_FACTOR * rates.lr), rates.min_lr)
    fields = {"lr": lr, "max_lr": max(limit, lr)}  # what was found may lie far below lr
    text = (
        f"If the loss is not as low as it can get: the rate is {rates.rate:.2g}; the factor that the warm-up found is "
        "kept, so raise lr threefold (under a scheduler, its base rate)."
    )
    return {**fields, "text": text}


def _rounded(x: float) -> float:
    return float(f"{x:.2g}")
