"""Tells a real rise or fall of the loss from noise, by comparing two halves of recent losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MIN_LOSSES = 10
"""Fewer losses are not judged, since they say too little about their noise."""
RISE_ERRORS, FALL_ERRORS = 4.0, 2.0
"""A rise and a fall must exceed these numbers of standard errors.  A rise must exceed more, since it ends a run."""
LEAST_FALL = 1e-4
"""A smaller fall, relative to the loss, does not count, even without noise."""
_MAD_TO_DEVIATION = 1.4826
_MEDIAN_ERROR = 1.2533
"""√(π/2): the standard error of the median of normal numbers, divided by that of their mean."""


class Trend(NamedTuple):
    """Two halves of recent losses, compared.

    Attributes:
        before, after: medians of the first and of the second half.
        error: standard error of their difference, from the noise within the halves.
        error_before: the same with the noise of the first half only: losses that explode are no noise.
        apart: the lower quartile of the second half lies above the upper quartile of the first.
    """

    before: float
    after: float
    error: float
    error_before: float
    apart: bool

    @property
    def fall(self) -> float:
        """`before` − `after`; negative while the loss rises."""
        return self.before - self.after

    def rises(self, ratio: float) -> bool:
        """The loss rises by more than `ratio` of its level and by more than its noise explains."""
        return self.apart and -self.fall > max(ratio * abs(self.before), RISE_ERRORS * self.error_before)

    def falls(self) -> bool:
        """The loss falls by more than its noise explains, and by more than `LEAST_FALL` of its level."""
        return self.fall > max(FALL_ERRORS * self.error, LEAST_FALL * abs(self.before))

    def falls_less_than(self, ratio: float) -> bool:
        """The fall is less than `ratio` of the loss's level, even if noise hides a part of it."""
        return self.fall + FALL_ERRORS * self.error < ratio * abs(self.before) or self.fall == self.error == 0

    def may_fall(self, amount: float) -> bool:
        """The true fall may be `amount`, within the noise."""
        return self.fall + FALL_ERRORS * self.error >= amount

    def __str__(self) -> str:
        return f"{self.before:.4g} in the first half, {self.after:.4g} in the second (± {self.error:.2g})"


def loss_trend(losses: Sequence[float] | np.ndarray) -> Trend | None:
    """Compares the two halves of some losses.

    Levels are medians and quartiles, so spikes in up to a quarter of a half do not matter.  Noise is the median
    deviation of the differences between losses that are a fifth of a half apart, so it does not include a trend.

    Args:
        losses: in the order of the steps, not smoothed, since running means hide their noise.

    Returns:
        None for fewer than `MIN_LOSSES` losses, or where one is not finite.
    """
    values = np.asarray(losses, np.float64).reshape(-1)
    if values.size < MIN_LOSSES or not np.isfinite(values).all():
        return None
    half = values.size // 2
    first, second = values[:half], values[-half:]
    noise = _noise(first), _noise(second)
    scale = _MEDIAN_ERROR / math.sqrt(half)
    return Trend(
        before=float(np.median(first)),
        after=float(np.median(second)),
        error=scale * math.hypot(*noise),
        error_before=scale * math.sqrt(2) * noise[0],
        apart=bool(np.quantile(second, 0.25) > np.quantile(first, 0.75)),
    )


def _noise(values: np.ndarray) -> float:
    lag = values.size // 5
    differences = values[lag:] - values[:-lag]
    return _MAD_TO_DEVIATION * float(np.median(np.abs(differences - np.median(differences)))) / math.sqrt(2)
