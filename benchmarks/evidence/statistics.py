"""Means, spreads and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Summary(NamedTuple):
    """Of one figure over seeds.

    Attributes:
        mean: infinite where a run diverged.
        spread: sample standard deviation; 0 of one value, infinite where a run diverged.
        seeds: how many.
    """

    mean: float
    spread: float
    seeds: int


def summary(values: Sequence[float]) -> Summary:
    """The summary of at least one value."""
    if not all(map(math.isfinite, values)):
        return Summary(math.inf, math.inf, len(values))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Summary(float(np.mean(values)), spread, len(values))


class Interval(NamedTuple):
    """A mean with the ends of its two-sided confidence interval."""

    mean: float
    low: float
    high: float
    seeds: int


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The interval of the mean of independent values, by Student's t; infinitely wide with fewer than two."""
    found = summary(values)
    if found.seeds < 2 or not math.isfinite(found.mean):
        return Interval(found.mean, -math.inf, math.inf, found.seeds)
    half = float(stats.t.ppf(0.5 + confidence / 2, found.seeds - 1)) * found.spread / math.sqrt(found.seeds)
    return Interval(found.mean, found.mean - half, found.mean + half, found.seeds)


def differences(ours: Mapping[int, float], theirs: Mapping[int, float], *, relative: bool = False) -> list[float]:
    """Ours minus theirs of every seed that both have; divided by theirs where `relative`."""
    shared = sorted(ours.keys() & theirs.keys())
    return [_difference(ours[seed], theirs[seed], relative) for seed in shared]


def _difference(ours: float, theirs: float, relative: bool) -> float:
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return math.inf
    return (ours - theirs) / theirs if relative else ours - theirs
