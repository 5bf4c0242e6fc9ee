"""What one call does to one batch: sections 4 to 6."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from automagic_core import MAX_STEP, Slot
from automagic_torch import polarity
from automagic_torch.call import Batch
from automagic_torch.cameamp import scale_by_cameamp
from automagic_torch.gradients import raw_gradients, usable_or_zero
from automagic_torch.learning_rate import vote
from automagic_torch.parameters import HALF_DTYPES, add_updates
from automagic_torch.stacked import spread, stacked
from automagic_torch.stages.chain import after_stages
from automagic_torch.stages.energy import StageEnergy
from automagic_torch.states import States, read_states, replace, write_states

OnUpdate = Callable[[Tensor, Tensor], None]


def update_batch(batch: Batch, energy: StageEnergy, on_update: OnUpdate | None) -> None:
    """Gradients, states, votes and parameters of a batch.

    Args:
        batch: its states and parameters change; its vote is added to its call.
        energy: is told the gradients before and after every stage.
        on_update: is shown every parameter and its update in float32 before the parameter changes.
    """
    config = batch.call.config
    before = stacked(batch.params)
    stored = {name: stacked([state[name] for state in batch.states]) for name in batch.names}
    ok, delta, new = _step(batch, before, stored, energy)

    write_states(batch.states, stored, new, ok, batch.plan, batch.rounding_key if config.stochastic_rounding else None)
    skipped = stored["skipped_steps"]
    replace(batch.states, "skipped_steps", skipped + (~ok & (skipped < MAX_STEP)))
    if on_update is not None:
        shown = torch.where(spread(ok, delta), delta, 0.0)
        for p, update in zip(batch.params, shown, strict=True):
            on_update(p, update)
    rounded = before.dtype in HALF_DTYPES and config.stochastic_rounding_params
    add_updates(batch.params, before, delta, ok, batch.rounding_key(Slot.parameters) if rounded else None)


def _step(batch: Batch, before: Tensor, stored: States, energy: StageEnergy) -> tuple[Tensor, Tensor, States]:
    """Which arrays can be used, their updates in float32, and the new values of their states.

    It holds many arrays as large as the batch; on return only the results are left of them.
    """
    call, plan, config = batch.call, batch.plan, batch.call.config
    g = raw_gradients(batch.params)
    ok = batch.usable(g)
    g = usable_or_zero(g, ok)
    w = before.float()
    old = read_states(stored, plan)
    new_age = old["age"] + (old["age"] < MAX_STEP)
    age = new_age.float()

    g, stage_states = after_stages(batch, g, w, old, age, energy)
    direction = scale_by_cameamp(g, old, age, plan, config)
    eta = call.rates(g.device)
    eta_rows = eta.rows(old.get("lr_mask"), direction.kappa)
    delta = direction.d.mul_(-eta_rows)
    if config.weight_decay != 0:
        delta.sub_((w * direction.b).mul_(eta.array * config.weight_decay))
    # An infinite weight that decays by an infinite amount, or by 0 · ∞, would become NaN; by a finite one it stays.
    delta.nan_to_num_(0.0)

    new = {"age": new_age} | stage_states | direction.states
    if "last_polarity" in stored:
        if call.voting:
            ballot = vote(g, stored["last_polarity"], ok & (stored["age"] >= 1), plan)
            call.votes.append((batch, ballot, old.get("lr_mask")))
        new["last_polarity"] = polarity.updated(stored["last_polarity"], g)
    return ok, delta, new
