"""Watches a run for divergence, stalls, skipped steps and memory pressure.

The frameworks differ in how numbers come off the device.  The subclasses of `TrainingMonitor` do that.
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
"""A divergence is a rise by more than this part of the loss."""
NOISE_RATIO = 0.1
"""There is no verdict of a stall where noise could hide a fall by this part of the loss."""
MEMORY_LIMIT = 0.9
"""Memory pressure is use of more than this part of the device's memory."""
_LONGER_SPANS = (2, 4, 8)
"""Numbers of windows in which slow falls and earlier jumps are looked for."""


class TrainingMonitor(ABC):
    """Judges a run by its last `window_size` losses.

    The rules are checked in this order.  They compare the two halves of the window (`automagic_core.loss_trend`).

    - ``"divergence"``: a loss in the window is not finite.  Or there are at least 10 losses, the loss rose by more than
      a tenth of its level and by more than four standard errors, and the lower quartile of the second half lies above
      the upper quartile of the first.  Spikes shorter than an eighth of the window are therefore ignored.  The last 2,
      4 and 8 windows are checked in the same way: a jump is reported until the loss has come down, or for 8 windows.
    - ``"memory_pressure"``: more than 90 % of the device's memory is in use; never where that is not known (CPU).
    - ``"skipped_steps"``: an array was skipped in the window (counted in steps of a tenth of it).
    - ``"convergence_stall"``: the window is full, and the loss falls by less than two standard errors (0.01 % without
      noise).  The noise is so small that a fall by a tenth would be seen, and no span of 2, 4 or 8 windows shows a
      slower fall that may still go on.  The noisier the loss, the larger a window it needs.

    Args:
        window_size: how many losses are judged, at least 10.
        memory_use: returns the part of the device's memory that is in use, or None where that is not known.

    Attributes:
        updates: number of losses since the beginning or the last `reset`.

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
        """Forgets all losses; call it after a change, so that the next verdict is about the changed run."""
        self._losses.clear()
        self._pending.clear()
        self._counts.clear()
        self.updates = 0
        self._note_skipped()

    def should_adjust_config(self) -> tuple[bool, str | None]:
        """Whether something is wrong, and the most urgent issue or None.  Waits for the device."""
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
        """Suggests what to change: `automagic_core.suggestion` at the run's rates.

        Args:
            issue: as `should_adjust_config` returns it.

        Returns:
            ``"text"`` and perhaps fields of `Config` with new values.

        Raises:
            ValueError: an unknown issue.
        """
        return suggestion(issue, self._rates())

    @abstractmethod
    def _to_floats(self, losses: list[Any]) -> list[float]:
        """Brings losses to the host together, in the form that `_record` got."""

    @abstractmethod
    def _skipped_now(self) -> Any:
        """The sum of all `skipped_steps`, on the device; None where it is not known."""

    @abstractmethod
    def _count(self, skipped: Any) -> int:
        """The sum that `_skipped_now` returned, on the host."""

    @abstractmethod
    def _rates(self) -> RunRates | None:
        """The run's rates; None where they are not known."""

    @property
    def _notes_skipped(self) -> bool:
        """Whether the next update notes `skipped_steps`."""
        return (self.updates + 1) % self._stride == 0

    def _record(self, loss: Any) -> None:
        """Keeps a loss without waiting for it."""
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
        # The skipped steps in the window are counted from the last note before it.
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
        """The trends over several windows with the numbers of these windows, as far as losses were kept."""
        numbers_of_windows = [n for n in _LONGER_SPANS if n * self.window_size <= losses.size]
        trends = [(n, loss_trend(losses[-n * self.window_size :])) for n in numbers_of_windows]
        return [(n, trend) for n, trend in trends if trend is not None]


def _stalls(trend: Trend, longer: list[tuple[int, Trend]]) -> bool:
    if trend.falls() or not trend.falls_less_than(NOISE_RATIO):
        return False
    # `fall` is the fall over half of a trend's span.
    return not any(slow.falls() and trend.may_fall(slow.fall / n) for n, slow in longer)
