"""One step: its groups (`Call`), and their arrays in batches (`Batch`; docs/algorithm.md, section 8)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from automagic_core import MAX_STEP, Config, Slot, StatePlan, rounding_key
from automagic_core.arrays.group_keys import AGREEMENT, EFFECTIVE_LR, LOG_RATE_SCALE, SEARCH_KEYS, STEP
from automagic_core.arrays.state_forms import SLOTS, coded_shapes, moment_of
from automagic_torch.arrays.dtensors import is_dtensor, whole, with_local
from automagic_torch.arrays.stacked import square_norm, to_device
from automagic_torch.arrays.usable import are_usable, gradients, raw_gradients
from automagic_torch.cameamp.groups import group_config, group_device
from automagic_torch.cameamp.learning_rate import (
    Evidence,
    Rates,
    Search,
    Vote,
    agreed,
    new_lr_mask,
    pooled,
    rates,
    searched,
)
from automagic_torch.codec.stored import Form, States
from automagic_torch.sharding.extent import Extent
from automagic_torch.stages.chain import StageArrays
from automagic_torch.stages.clip_by_percentile import clipping_factor, recorded, total
from automagic_torch.stages.energy import StageEnergy, stages_on
from automagic_torch.stages.norm_history import HISTORY, POSITION


class Ballot(NamedTuple):
    """What a batch says to the search in one step; None where it is not asked."""

    batch: Batch
    evidence: Evidence | None
    vote: Vote | None
    lr_mask: Tensor | None
    """Before this step."""


@dataclass
class Call:
    """One step of one parameter group.

    Attributes:
        group: the group; its step is set to t before arrays are updated.
        config: its hyperparameters without `lr`.
        step: t.
        batches: the arrays that take part in the step.
        ballots: one for every batch, while the rate is searched.
    """

    group: dict[str, Any]
    config: Config
    step: int
    batches: list[Batch] = field(default_factory=list)
    ballots: list[Ballot] = field(default_factory=list)
    _rates: dict[torch.device, Rates] = field(default_factory=dict)
    _factor: Tensor | None = None

    @property
    def counts(self) -> bool:
        """Whether this is a step of the group: its first one is that of its first gradient (section 1.5)."""
        # Another process may hold the elements of its arrays.  A group without arrays waits for its first.
        params = self.group["params"]
        elsewhere = bool(params) and not any(is_lazy(p) or p.numel() for p in params)
        return self.group[STEP] > 0 or bool(self.batches) or elsewhere

    @property
    def warming(self) -> bool:
        """t ≤ `warmup_steps`."""
        return self.step <= self.config.warmup_steps

    @property
    def voting(self) -> bool:
        """Votes are cast in this step."""
        return self.warming and self.step >= 2 and self.config.votes

    @property
    def searching(self) -> bool:
        """Every array's walk goes on in this step."""
        return self.warming and self.config.searches

    def begin(self) -> None:
        """Counts the step."""
        device = group_device(self.group)
        self.group[STEP] = self.step
        for key in SEARCH_KEYS:
            self.group[key] = to_device(self.group[key], device)
        rates = self.rates(device)
        self.group[LOG_RATE_SCALE], self.group[EFFECTIVE_LR] = rates.ell, rates.array

    def end(self) -> None:
        """Lets go of the arrays.  Else the cycle of calls and batches would keep states that the next step replaces."""
        self.batches.clear()
        self.ballots.clear()

    def rates(self, device: torch.device) -> Rates:
        """The rates on a device, formed once for each."""
        if device not in self._rates:
            lr, ell = self.group["lr"], self.group[LOG_RATE_SCALE]
            self._rates[device] = rates(lr, ell, self.step, self.config, device)
        return self._rates[device]

    def clip(self) -> None:
        """Stage 1: records n² of the group's arrays, and forms the factor for their gradients (section 4.1)."""
        if not self.config.clips_by_percentile:
            return
        device = self.group[LOG_RATE_SCALE].device
        square_norm = total([to_device(batch.square_norm(), device) for batch in self.batches], device)
        history, position = (to_device(self.group[name], device) for name in (HISTORY, POSITION))
        self.group[HISTORY], self.group[POSITION] = recorded(square_norm, history, position)
        self._factor = clipping_factor(square_norm, self.group[HISTORY], self.config.percentile_clipping)

    def clipping_factor(self, device: torch.device) -> Tensor | None:
        """The factor of stage 1 for every gradient of the group, 0-d; None where the stage is off."""
        return None if self._factor is None else to_device(self._factor, device)

    @property
    def held(self) -> Search:
        """What the group holds for its search."""
        return Search(*(self.group[key] for key in SEARCH_KEYS))

    def kept(self, device: torch.device) -> Tensor | float:
        """What is kept of every walk in this step.  A group's first step keeps nothing: an array may have moved in."""
        if self.step == 1:
            return 0.0
        kept = self.held.kept(self.config)
        return to_device(kept, device) if isinstance(kept, Tensor) else kept

    def kept_of(self, walk: Tensor) -> Tensor:
        """What is kept of a `walk`, in memory of its own."""
        local = walk.to_local() if is_dtensor(walk) else walk  # a DTensor cannot be pinned
        kept = local.clone().pin_memory() if local.is_pinned() else local.clone()
        kept.mul_(self.kept(walk.device))
        return with_local(walk, kept) if is_dtensor(walk) else kept

    def search(self, absent: Iterable[Tensor]) -> None:
        """Moves what the search holds, by the ballots of this step (section 5.8).

        Args:
            absent: the new `walk` of those arrays of the group that do not take part.
        """
        group, device = self.group, self.group[LOG_RATE_SCALE].device
        votes = [ballot.vote for ballot in self.ballots if ballot.vote is not None]
        if votes:
            a_hat, any_votes = pooled(votes, device)
            group[AGREEMENT] = agreed(group[AGREEMENT], a_hat, any_votes)
            for batch, _, vote, lr_mask in self.ballots:
                if vote is not None and lr_mask is not None:
                    new_mask = new_lr_mask(lr_mask, vote, a_hat, batch.plan, self.config)
                    batch.extent.replace(batch.states, "lr_mask", new_mask)
        found = [ballot.evidence for ballot in self.ballots if ballot.evidence is not None]
        if found:
            for walk in absent:
                nothing = torch.zeros(1, dtype=torch.float32, device=walk.device)
                found.append(Evidence(square_norm(whole(walk)).view(1), nothing, nothing))
            search = searched(self.held, found, self.rates(device), self.step, self.config)
            group.update(zip(SEARCH_KEYS, search, strict=True))


class OpenStep:
    """A step of all groups that has begun.

    Attributes:
        calls: one for every group.
        energy: what the gradient stages did so far.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        self.calls = [Call(group, group_config(group), min(group[STEP] + 1, MAX_STEP)) for group in groups]
        self.energy = StageEnergy(stages_on(call.config for call in self.calls))


@dataclass
class Batch:
    """Arrays of one group and one kind, which are stacked and computed as one.

    Attributes:
        call: the call of their group.
        extent: the part of them that this process holds.
        forms: shape and dtype of each of their stored tensors in this call, by its name.
        arrays: what the stages must know about them.
        params: the parameters; each has a gradient and at least one element.
        states: their states; the entries of these dicts are replaced.
    """

    call: Call
    extent: Extent
    forms: Mapping[str, Form]
    arrays: StageArrays
    params: list[Tensor] = field(default_factory=list)
    states: list[States] = field(default_factory=list)
    in_place: bool = True
    """Nobody else holds the tensors in `states`."""
    stack: States | None = None
    """Their states as the last step left them, stacked."""
    _usable: Tensor | None = None
    _square_norm: Tensor | None = None

    @property
    def names(self) -> Set[str]:
        """The names of their stored tensors."""
        return self.forms.keys()

    @property
    def plan(self) -> StatePlan:
        """The plan of the whole arrays."""
        return self.extent.plan

    def raw_gradients(self) -> Tensor:
        """This process's pieces of the gradients, stacked: `automagic_torch.arrays.usable.raw_gradients`."""
        return raw_gradients(self.extent.gradients_here(gradients(self.params)))

    def usable(self, g: Tensor) -> Tensor:
        """(arrays,) bool: False for arrays that are skipped because of their raw gradients g (section 6.2)."""
        if self._usable is None:
            self._usable = are_usable(g)
        return self._usable

    def know(self, usable: Tensor, square_norm: Tensor) -> None:
        """Sets what the processes agreed on, where each has only a piece of the gradients.

        Args:
            usable: as `usable` returns it.
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
        """The key of the random bits that the arrays share; that of the walk is the same at every step."""
        step = 0 if slot == Slot.walk else self.call.step
        return (rounding_key(step, slot, self.plan.size) + self.extent.first) % 2**32

    @property
    def random_states(self) -> list[tuple[Slot, int]]:
        """Slot and size of all states that have random bits."""
        return [(SLOTS[moment_of(name)], math.prod(shape)) for name, shape in coded_shapes(self.plan).items()]

    def state_key(self, slot: Slot, size: int) -> int:
        """The key of the random bits for states of the whole arrays that have some size."""
        return rounding_key(self.call.step, slot, size)
