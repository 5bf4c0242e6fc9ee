"""One call of the optimizer: what a group and an array bring to it, and what it does to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from automagic_core import MAX_STEP, Config, StatePlan
from automagic_torch.cameamp import scale_by_cameamp
from automagic_torch.gradients import raw_gradient
from automagic_torch.groups import is_embedding, is_lora
from automagic_torch.learning_rate import (
    Rates,
    Vote,
    moved,
    new_lr_mask,
    new_lr_scale,
    new_polarity,
    pooled,
    rates,
    vote,
)
from automagic_torch.parameters import add_update
from automagic_torch.stages import encourage_low_rank, suppress_edges, suppress_high_frequencies
from automagic_torch.stages.percentile import clipping_factor, recorded
from automagic_torch.states import WARM_UP_ONLY, States, read_state, write_state

NORM_STATES = ("norm_history", "norm_position")


@dataclass
class Call:
    """One parameter group in one call.

    Attributes:
        group: the group; its ``"step"`` is t already when arrays are updated.
        config: its hyperparameters without `lr`.
        step: t.
    """

    group: dict[str, Any]
    config: Config
    step: int
    _rates: dict[torch.device, Rates] = field(default_factory=dict)
    _factor: Tensor | None = None
    votes: list[tuple[Array, Vote]] = field(default_factory=list)

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

    def clipping_factor(self, device: torch.device) -> Tensor | None:
        """What stage 1 multiplies every gradient of the group by; None where it is off."""
        return None if self._factor is None else moved(self._factor, device)

    def clip(self, arrays: list[Array]) -> None:
        """Stage 1 over the group's arrays: the new history, and the factor."""
        if not self.config.clips_by_percentile:
            return
        history, position = (moved(self.group[name], self.group["lr_scale"].device) for name in NORM_STATES)
        square_norm = torch.zeros_like(self.group["lr_scale"])
        for array in arrays:
            norm = torch.linalg.vector_norm(raw_gradient(array.param)).square()
            square_norm = square_norm + moved(torch.where(array.ok, norm, torch.nan), history.device)
        history, position = recorded(square_norm, history, position)
        self.group["norm_history"], self.group["norm_position"] = history, position
        self._factor = clipping_factor(square_norm, history, self.config.percentile_clipping)


@dataclass
class Array:
    """One parameter in one call: it has a gradient and at least one element.

    Attributes:
        param: the parameter.
        state: its stored state, changed in place.
        plan: the state's plan.
        ok: 0-d bool, the gradient is usable; else the array is skipped (section 6).
        call: its group's call.
    """

    param: Tensor
    state: States
    plan: StatePlan
    ok: Tensor
    call: Call


def update_array(array: Array, g: Tensor, on_update: Callable[[Tensor, Tensor], None] | None) -> None:
    """Sections 5 and 6 for one array: states, vote and parameter.

    Args:
        array: changed in place.
        g: its gradient after stage 1, finite float32.
        on_update: is shown the parameter and its update in float32 before the parameter changes.
    """
    p, plan, ok, call, config = array.param, array.plan, array.ok, array.call, array.call.config
    old = read_state(array.state, plan)
    w = p.detach().float().contiguous()
    marks: dict[str, Any] = {"layout": call.group["layout"], "embedding": is_embedding(p)}
    edge_history = None
    if config.suppresses_edges:
        penalty, threshold = config.edge_penalty, config.edge_threshold
        history, age = old.get("edge_history"), old["age"] + 1
        g, edge_history = suppress_edges(g, history, age, penalty=penalty, threshold=threshold, **marks)
    if config.suppresses_frequencies:
        g = suppress_high_frequencies(g, penalty=config.frequency_penalty, layout=call.group["layout"])
    if config.encourages_low_rank and is_lora(p):
        strength, emphasis = config.rank_penalty_strength, config.low_rank_emphasis
        g = encourage_low_rank(g, w, strength=strength, emphasis=emphasis, **marks)
    direction = scale_by_cameamp(g, old, plan, call.config)
    eta = call.rates(p.device)
    eta_rows = eta.rows(old.get("lr_mask"), direction.kappa)
    delta = -(eta_rows * direction.d + eta.array * call.config.weight_decay * direction.b * w)
    delta = torch.where(ok, delta, 0.0)

    new = direction.states
    if edge_history is not None:
        new["edge_history"] = edge_history
    if "last_polarity" in old:
        if call.voting:
            ballot = vote(g, old["last_polarity"], ok & (old["age"] >= 1), plan)
            call.votes.append((array, ballot))
        new["last_polarity"] = new_polarity(g, old["last_polarity"])
    write_state(array.state, new, ok, plan, call.step, call.config.stochastic_rounding)
    skipped = array.state["skipped_steps"]
    array.state["skipped_steps"] = skipped + (~ok & (skipped < MAX_STEP))

    if on_update is not None:
        on_update(p, delta)
    add_update(p, delta, ok, call.step, call.config.stochastic_rounding_params)


def finish(call: Call, states: Mapping[Tensor, States]) -> None:
    """What a group does after its arrays: the pooled vote, and the end of the warm-up.

    Args:
        call: its group's `lr_scale` and its arrays' `lr_mask` change.
        states: of all parameters; the group's lose what only the warm-up needs.
    """
    if call.votes:
        group = call.group
        a_hat, any_counts = pooled([ballot for _, ballot in call.votes], group["lr_scale"].device)
        for array, ballot in call.votes:
            if array.plan.has_lr_mask:
                lr_mask = array.state["lr_mask"]
                array.state["lr_mask"] = new_lr_mask(lr_mask, ballot, a_hat, array.plan, call.config)
        group["lr_scale"] = new_lr_scale(group["lr_scale"], a_hat, any_counts, group["lr"], call.config)
    if call.step >= call.config.warmup_steps:
        for p in call.group["params"]:
            for name in WARM_UP_ONLY if p in states else ():
                states[p].pop(name, None)
