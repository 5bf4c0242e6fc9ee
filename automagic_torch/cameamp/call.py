"""One call of the optimizer on one parameter group: what its arrays share, and the arrays in batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from automagic_core import Config, Slot, StatePlan, rounding_key
from automagic_torch.arrays.stacked import moved, square_norm
from automagic_torch.arrays.usable import are_usable, gradients, raw_gradients
from automagic_torch.cameamp.learning_rate import Rates, Vote, new_lr_mask, new_lr_scale, pooled, rates
from automagic_torch.codec.stored import States
from automagic_torch.sharding.extent import Extent
from automagic_torch.stages.chain import StageInputs
from automagic_torch.stages.clip_by_percentile import clipping_factor, recorded, total
from automagic_torch.stages.norm_history import HISTORY, POSITION


@dataclass
class Call:
    """One parameter group in one call.

    Attributes:
        group: the group; its ``"step"`` is t already when arrays are updated.
        config: its hyperparameters without `lr`.
        step: t.
        batches: its arrays that take part.
        votes: every batch's vote, and its `lr_mask` before the step, if it has one.
    """

    group: dict[str, Any]
    config: Config
    step: int
    batches: list[Batch] = field(default_factory=list)
    votes: list[tuple[Batch, Vote, Tensor | None]] = field(default_factory=list)
    _rates: dict[torch.device, Rates] = field(default_factory=dict)
    _factor: Tensor | None = None

    @property
    def warming(self) -> bool:
        """t ≤ `warmup_steps`."""
        return self.step <= self.config.warmup_steps

    @property
    def voting(self) -> bool:
        """There is a vote at this t."""
        return self.warming and self.step >= 2 and self.config.lr_mask_gain > 0

    def rates(self, device: torch.device) -> Rates:
        """Made once for every device."""
        if device not in self._rates:
            lr, lr_scale = self.group["lr"], self.group["lr_scale"]
            self._rates[device] = rates(lr, lr_scale, self.step, self.config, device)
        return self._rates[device]

    def clip(self) -> None:
        """Stage 1 (section 4): records n² of the group's arrays, and finds what to multiply their gradients by."""
        if not self.config.clips_by_percentile:
            return
        device = self.group["lr_scale"].device
        square_norm = total([moved(batch.square_norm(), device) for batch in self.batches], device)
        history, position = (moved(self.group[name], device) for name in (HISTORY, POSITION))
        self.group[HISTORY], self.group[POSITION] = recorded(square_norm, history, position)
        self._factor = clipping_factor(square_norm, self.group[HISTORY], self.config.percentile_clipping)

    def clipping_factor(self, device: torch.device) -> Tensor | None:
        """What stage 1 multiplies every gradient of the group by, 0-d; None where it is off."""
        return None if self._factor is None else moved(self._factor, device)

    def count_votes(self) -> None:
        """Section 5: the pooled vote moves the group's `lr_scale` and its arrays' `lr_mask`."""
        if not self.votes:
            return
        group = self.group
        a_hat, any_counts = pooled([vote for _, vote, _ in self.votes], group["lr_scale"].device)
        for batch, vote, lr_mask in self.votes:
            if lr_mask is not None:
                batch.extent.replace(
                    batch.states, "lr_mask", new_lr_mask(lr_mask, vote, a_hat, batch.plan, self.config)
                )
        group["lr_scale"] = new_lr_scale(group["lr_scale"], a_hat, any_counts, group["lr"], self.config)


@dataclass
class Batch:
    """Arrays of one group, shape, dtype, device and kind, which are computed with as one, stacked.

    Attributes:
        call: their group's call.
        extent: what of them this process holds.
        names: which states there are in this call.
        arrays: what the stages must know of them.
        params: the parameters; each has a gradient and at least one element.
        states: their stored states, changed in place.
    """

    call: Call
    extent: Extent
    names: frozenset[str]
    arrays: StageInputs
    params: list[Tensor] = field(default_factory=list)
    states: list[States] = field(default_factory=list)
    _usable: Tensor | None = None
    _square_norm: Tensor | None = None

    @property
    def plan(self) -> StatePlan:
        """Of the states of the whole arrays."""
        return self.extent.plan

    def raw_gradients(self) -> Tensor:
        """What is here of the gradients: `automagic_torch.arrays.usable.raw_gradients`."""
        return raw_gradients(self.extent.gradients_here(gradients(self.params)))

    def usable(self, g: Tensor) -> Tensor:
        """(arrays,) bool: the raw gradients g can be used; the others' arrays are skipped (section 6)."""
        if self._usable is None:
            self._usable = are_usable(g)
        return self._usable

    def know(self, usable: Tensor, square_norm: Tensor) -> None:
        """What the processes have agreed on, where each has but a part of the gradients.

        Args:
            usable: as `usable` gives it.
            square_norm: Σ g² of the raw gradients, 0-d.
        """
        self._usable, self._square_norm = usable, square_norm

    def square_norm(self) -> Tensor:
        """Σ g² of the raw gradients, 0-d; NaN when one of the arrays is skipped."""
        norm = self._square_norm
        if norm is None:
            g = self.raw_gradients()
            self.usable(g)
            norm = square_norm(g)
        assert self._usable is not None
        return torch.where(self._usable.all(), norm, torch.nan)

    def rounding_key(self, slot: Slot) -> int:
        """Of the random bits that the arrays share."""
        return (rounding_key(self.call.step, slot, self.plan.size) + self.extent.first) % 2**32
