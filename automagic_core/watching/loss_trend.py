"""What a stretch of losses does, told apart from its noise: its first half against its second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MIN_LOSSES = 10
"""Fewer losses are not judged: they say too little about their noise."""
RISE_ERRORS, FALL_ERRORS = 4.0, 2.0
"""Standard errors beyond which a rise and a fall count as seen.  A rise is looked for at every step and ends a run."""
LEAST_FALL = 1e-4
"""A smaller fall, relative to the loss, is none, however little noise there is."""
_MAD_TO_DEVIATION = 1.4826
_MEDIAN_ERROR = 1.2533
"""The standard error of a median of normal numbers over that of their mean, √(π/2)."""


class Trend(NamedTuple):
    """The two halves of a stretch of losses.

    Attributes:
        before, after: medians of the first and of the second half.
        error: standard error of their difference, from the noise within the halves.
        error_before: the same, were the second half as noisy as the first: losses that explode are no noise.
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
        """The loss has left the band where it was, by more than `ratio` of its level."""
        return self.apart and -self.fall > max(ratio * abs(self.before), RISE_ERRORS * self.error_before)

    def falls(self) -> bool:
        """The loss falls by more than its noise explains, and by `LEAST_FALL` of its level at least."""
        return self.fall > max(FALL_ERRORS * self.error, LEAST_FALL * abs(self.before))

    def falls_less_than(self, ratio: float) -> bool:
        """The fall is less than `ratio` of the loss's level, and noise does not hide that it may be more."""
        return self.fall + FALL_ERRORS * self.error < ratio * abs(self.before) or self.fall == self.error == 0

    def may_fall(self, amount: float) -> bool:
        """A fall by `amount` is within the noise of the one seen."""
        return self.fall + FALL_ERRORS * self.error >= amount

    def __str__(self) -> str:
        return f"{self.before:.4g} in the first half, {self.after:.4g} in the second (± {self.error:.2g})"


def loss_trend(losses: Sequence[float] | np.ndarray) -> Trend | None:
    """Compares the halves of a stretch of losses.

    The levels are medians and quartiles, so that spikes in a quarter of a half's losses do not matter.  The noise is
    the median deviation of the differences between losses a fifth of a half apart: a trend does not count as noise, and
    noise that lasts a few steps still does.

    Args:
        losses: in the order of the steps, as they were computed; running means hide their noise.

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
