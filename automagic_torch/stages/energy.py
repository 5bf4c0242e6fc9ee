"""How much energy every gradient stage takes or adds, for dashboards; nothing waits for a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from automagic_core import Config
from automagic_torch.arrays.stacked import moved, square_norm

NAMES = ("clip_by_percentile", "suppress_edges", "suppress_high_frequencies", "encourage_low_rank")


class StageEnergy:
    """Squared norms of the gradients of one call, before and after every stage that is on.

    Arrays that a stage leaves alone count on both sides, those of groups in which it is off too.
    """

    def __init__(self, configs: Iterable[Config]) -> None:
        on = [_switches(config) for config in configs]
        self._before: dict[str, list[Tensor]] = {
            name: [] for name, *switches in zip(NAMES, *on, strict=True) if any(switches)
        }
        self._after: dict[str, list[Tensor]] = {name: [] for name in self._before}
        self._now: Tensor | None = None
        self._square_norm: Callable[[Tensor], Tensor] = square_norm

    def begin(self, g: Tensor, square_norm: Callable[[Tensor], Tensor]) -> None:
        """The next batch: its raw gradients, those of skipped arrays as zeros, and what gives their Σ g²."""
        self._square_norm = square_norm
        self._now = square_norm(g) if self._before else None

    def scaled(self, stage: str, factor: Tensor | None) -> None:
        """A stage multiplied the gradients by a 0-d factor, or by nothing."""
        if stage in self._before:
            assert self._now is not None
            self._record(stage, self._now if factor is None else self._now * factor.square())

    def passed(self, stage: str, g: Tensor, changed: bool) -> None:
        """A stage gave g; it is not measured again unless the stage may have changed it."""
        if stage in self._before:
            assert self._now is not None
            self._record(stage, self._square_norm(g) if changed else self._now)

    def _record(self, stage: str, after: Tensor) -> None:
        assert self._now is not None
        self._before[stage].append(self._now)
        self._after[stage].append(after)
        self._now = after

    def totals(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(before, after) by stage, 0-d float32 each; empty without arrays."""
        names = [name for name, values in self._before.items() if values]
        if not names:
            return {}
        # One sum for all stages: every batch went through all of them.
        before, after = (
            torch.stack([_together(values[name]) for name in names]).sum(1) for values in (self._before, self._after)
        )
        return dict(zip(names, zip(before, after, strict=True), strict=True))


def _switches(config: Config) -> tuple[bool, ...]:
    return (
        config.clips_by_percentile,
        config.suppresses_edges,
        config.suppresses_frequencies,
        config.encourages_low_rank,
    )


def _together(values: list[Tensor]) -> Tensor:
    return torch.stack([moved(value, values[0].device) for value in values])
