"""Records how much energy every gradient stage removes or adds (docs/algorithm.md, section 13)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from automagic_core import Config
from automagic_core.watching.metrics import STAGES
from automagic_torch.arrays.stacked import square_norm, to_device


class StageEnergy:
    """Squared norms of the gradients of one call, before and after every stage that is on in any group.

    All arrays count, also those that a stage leaves alone.  Nothing waits for a device.
    """

    def __init__(self, stages: Iterable[str]) -> None:
        self._before: dict[str, list[Tensor]] = {stage: [] for stage in stages}
        self._after: dict[str, list[Tensor]] = {name: [] for name in self._before}
        self._now: Tensor | None = None
        self._square_norm: Callable[[Tensor], Tensor] = square_norm

    def unchanged(self, square_norm: Tensor) -> None:
        """Records gradients with a known Σ g², 0-d, which all stages leave alone."""
        self._now = square_norm
        for stage in self._before:
            self._record(stage, square_norm, square_norm)

    @property
    def measures(self) -> bool:
        """Whether any stage is on."""
        return bool(self._before)

    def begin(self, g: Tensor, square_norm: Callable[[Tensor], Tensor]) -> None:
        """Records the gradients before the stages, zeros for skipped arrays; `square_norm` forms their Σ g²."""
        self._square_norm = square_norm
        self._now = square_norm(g) if self._before else None

    def scaled(self, stage: str, factor: Tensor | None) -> None:
        """Records that a stage multiplied the gradients by a 0-d factor, or left them alone (None)."""
        if stage in self._before and self._now is not None:
            self._record(stage, self._now, self._now if factor is None else self._now * factor.square())

    def passed(self, stage: str, g: Tensor, changed: bool) -> None:
        """Records that a stage returned g, which is measured only if the stage may have changed it."""
        if stage in self._before and self._now is not None:
            self._record(stage, self._now, self._square_norm(g) if changed else self._now)

    def _record(self, stage: str, before: Tensor, after: Tensor) -> None:
        self._before[stage].append(before)
        self._after[stage].append(after)
        self._now = after

    def totals(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(before, after) by stage, 0-d float32 each; empty without arrays."""
        names = [name for name, values in self._before.items() if values]
        if not names:
            return {}
        # Every batch went through all stages, so one sum serves all of them.
        before, after = (
            torch.stack([_together(values[name]) for name in names]).sum(1) for values in (self._before, self._after)
        )
        return dict(zip(names, zip(before, after, strict=True), strict=True))


def stages_on(configs: Iterable[Config]) -> tuple[str, ...]:
    """The stages that are on in any group."""
    return tuple(
        stage for stage, on in zip(STAGES, zip(*map(_switches, configs), strict=True), strict=False) if any(on)
    )


def _switches(config: Config) -> tuple[bool, ...]:
    return (
        config.clips_by_percentile,
        config.suppresses_edges,
        config.suppresses_frequencies,
        config.encourages_low_rank,
    )


def _together(values: list[Tensor]) -> Tensor:
    return torch.stack([to_device(value, values[0].device) for value in values])
