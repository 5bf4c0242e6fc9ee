"""Watching a run: the last losses against the ones before, skipped steps, and the device's memory.

What differs between the frameworks is how numbers come off the device; `TrainingMonitor` leaves that to its subclasses.
"""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from automagic_core.watching.loss_trend import MIN_LOSSES, Trend, loss_trend
from automagic_core.watching.suggestions import RunRates, suggestion

RISE_RATIO = 0.1
"""A rise of the loss by less than this part of its level is no divergence."""
NOISE_RATIO = 0.1
"""Where noise could hide a fall by this part of the loss's level, a stall cannot be told."""
MEMORY_LIMIT = 0.9
"""The part of the device's memory above which there is pressure."""
_LONGER_SPANS = (2, 4, 8)
"""Numbers of windows over which a fall too slow for one window, and a jump before it, are seen."""


class TrainingMonitor(ABC):
    """The last `window_size` losses of a run and what they say.

    The rules, each over the two halves of the window (`automagic_core.loss_trend`), in the order in which they are
    looked at:

    - ``"divergence"``: a loss in the window is not finite; or, from 10 losses on, the loss rose by more than a tenth of
      its level and by more than four standard errors, and the second half's lower quartile lies above the first half's
      upper quartile, so that spikes shorter than an eighth of the window are none.  The last 2, 4 and 8 windows are
      looked at in the same way: a loss that jumped and stays up is said to until it has come down, or for 8 windows.
    - ``"memory_pressure"``: more than 90 % of the device's memory is in use; never where that is not known (CPU).
    - ``"skipped_steps"``: an array's gradient was not finite in the window (counted in steps of a tenth of it).
    - ``"convergence_stall"``: the window is full; the loss does not fall by more than two standard errors (0.01 % where
      there is no noise); the noise is small enough that a fall by a tenth would be seen; and no span of 2, 4 or 8
      windows shows a fall whose pace the window could have kept.  The noisier the loss, the larger a window it needs.

    Args:
        window_size: how many losses are judged, at least 10.
        memory_use: the part of the device's memory that is in use, or None where that is not known; in place of the
            framework's own.

    Attributes:
        updates: losses noted since the beginning or the last `reset`.

    Raises:
        ValueError: a `window_size` that is no integer of at least 10.
    """

    updates: int

    def __init__(self, window_size: int, memory_use: Callable[[], float | None]) -> None:
        is_integer = isinstance(window_size, numbers.Integral) and not isinstance(window_size, bool)
        if not is_integer or window_size < MIN_LOSSES:
            raise ValueError(f"window_size = {window_size!r} is not valid; valid: an integer ≥ {MIN_LOSSES}")
        self.window_size = int(window_size)
        self.memory_use = memory_use
        self._stride = max(1, self.window_size // 10)
        history = max(_LONGER_SPANS) * self.window_size
        self._losses: deque[float] = deque(maxlen=history)
        self._pending: deque[Any] = deque(maxlen=history)
        self._counts: deque[tuple[int, Any]] = deque()
        self.reset()

    def reset(self) -> None:
        """Forgets what was seen; call it after a change, so that the next verdict is about the changed run."""
        self._losses.clear()
        self._pending.clear()
        self._counts.clear()
        self.updates = 0
        self._note_skipped()

    def should_adjust_config(self) -> tuple[bool, str | None]:
        """Whether something is wrong, and the most urgent issue, else None.  Waits for the device."""
        losses = self._history()
        window = losses[-self.window_size :]
        trend = loss_trend(window)
        longer = self._longer_trends(losses)
        rises = any(found.rises(RISE_RATIO) for found in ([trend] if trend else []) + [found for _, found in longer])
        if rises or not np.isfinite(window).all():
            return True, "divergence"
        used = self.memory_use()
        if used is not None and used > MEMORY_LIMIT:
            return True, "memory_pressure"
        if self._skipped_in_window():
            return True, "skipped_steps"
        if trend is not None and window.size == self.window_size and _stalls(trend, longer):
            return True, "convergence_stall"
        return False, None

    def get_adjustment_suggestion(self, issue: str) -> dict[str, Any]:
        """What to change: `automagic_core.suggestion` at the run's rates.

        Args:
            issue: what `should_adjust_config` returned.

        Returns:
            ``"text"`` and, where there are some, fields of `Config` with the values that they should get.

        Raises:
            ValueError: an unknown issue.
        """
        return suggestion(issue, self._rates())

    @abstractmethod
    def _to_floats(self, losses: list[Any]) -> list[float]:
        """Losses as `_record` got them, brought to the host together."""

    @abstractmethod
    def _skipped_now(self) -> Any:
        """The sum of all `skipped_steps`, still on the device; None where it is not known."""

    @abstractmethod
    def _count(self, skipped: Any) -> int:
        """What `_skipped_now` gave, on the host."""

    @abstractmethod
    def _rates(self) -> RunRates | None:
        """The run's rates; None where they are not known."""

    @property
    def _notes_skipped(self) -> bool:
        """The update being recorded is one that notes `skipped_steps`."""
        return (self.updates + 1) % self._stride == 0

    def _record(self, loss: Any) -> None:
        """Keeps a loss as it is, without waiting for it."""
        notes = self._notes_skipped
        self.updates += 1
        self._pending.append(loss)
        if notes:
            self._note_skipped()

    def _note_skipped(self) -> None:
        skipped = self._skipped_now()
        if skipped is None:
            return
        if len(self._counts) > 1 and self._counts[-1][0] == self.updates:
            self._counts.pop()
        self._counts.append((self.updates, skipped))
        # The last note from before the window is what the count in it starts from.
        while len(self._counts) > 1 and self._counts[1][0] <= self.updates - self.window_size:
            self._counts.popleft()

    def _skipped_in_window(self) -> bool:
        self._note_skipped()
        return bool(self._counts) and self._count(self._counts[-1][1]) > self._count(self._counts[0][1])

    def _history(self) -> np.ndarray:
        if self._pending:
            self._losses.extend(self._to_floats(list(self._pending)))
            self._pending.clear()
        return np.array(self._losses, np.float64)

    def _longer_trends(self, losses: np.ndarray) -> list[tuple[int, Trend]]:
        """The trends over several windows, with their numbers of windows, as far as losses were kept."""
        numbers_of_windows = [n for n in _LONGER_SPANS if n * self.window_size <= losses.size]
        trends = [(n, loss_trend(losses[-n * self.window_size :])) for n in numbers_of_windows]
        return [(n, trend) for n, trend in trends if trend is not None]


def _stalls(trend: Trend, longer: list[tuple[int, Trend]]) -> bool:
    if trend.falls() or not trend.falls_less_than(NOISE_RATIO):
        return False
    # A trend's fall is that over half of its span.
    return not any(slow.falls() and trend.may_fall(slow.fall / n) for n, slow in longer)
