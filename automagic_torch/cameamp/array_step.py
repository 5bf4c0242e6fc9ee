"""Updates one batch: gradients, states and parameters (docs/algorithm.md, sections 4 to 6)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from automagic_core import MAX_STEP, Slot
from automagic_torch.arrays.stacked import spread, stacked
from automagic_torch.arrays.usable import usable_or_zero
from automagic_torch.cameamp.call import Ballot, Batch
from automagic_torch.cameamp.equations import scale_by_cameamp
from automagic_torch.cameamp.learning_rate import evidence, new_walk, vote
from automagic_torch.cameamp.round_to_parameters import HALF_DTYPES, add_updates
from automagic_torch.codec.stored import States
from automagic_torch.stages.chain import StageInputs
from automagic_torch.stages.energy import StageEnergy

OnUpdate = Callable[[Tensor, Tensor], None]


def update_batch(batch: Batch, energy: StageEnergy, on_update: OnUpdate | None) -> None:
    """Updates the states and parameters of a batch, and adds its ballot to its call.

    Args:
        batch: the batch.
        energy: records the gradients before and after every stage.
        on_update: is called with every parameter and its update in float32, before the parameter changes.
    """
    config, extent = batch.call.config, batch.extent
    params = list(extent.here(batch.params))
    before = stacked(params)
    stored = {
        name: stacked(extent.states_here([state[name] for state in batch.states], before.device))
        for name in batch.names
    }
    ok, delta, new = _step(batch, before, stored, energy)

    extent.write(batch.states, stored, new, ok, batch.state_key if config.stochastic_rounding else None)
    skipped = stored["skipped_steps"]
    extent.replace(batch.states, "skipped_steps", skipped + (~ok & (skipped < MAX_STEP)))
    if on_update is not None:
        shown = torch.where(spread(ok, delta), delta, 0.0)
        for p, update in zip(batch.params, extent.like_parameters(shown), strict=True):
            on_update(p, update)
    rounded = before.dtype in HALF_DTYPES and config.stochastic_rounding_params
    add_updates(params, before, delta, ok, batch.rounding_key(Slot.parameters) if rounded else None)


def _step(batch: Batch, before: Tensor, stored: States, energy: StageEnergy) -> tuple[Tensor, Tensor, States]:
    """Which arrays are not skipped, their updates in float32, and the new values of their states.

    This is a function of its own so that its many temporary arrays are freed on return.
    """
    call, extent, config = batch.call, batch.extent, batch.call.config
    g = batch.raw_gradients()
    ok = batch.usable(g)
    g = usable_or_zero(g, ok)
    w = before.float()
    old = extent.read(stored)
    new_age = old["age"] + (old["age"] < MAX_STEP)
    age = new_age.float()

    # No name for the inputs, so that the raw gradients are freed here.
    g, stage_states = extent.after_stages(
        batch.arrays, StageInputs(call.clipping_factor(g.device), g, w, old.get("edge_history"), age), energy
    )
    direction = scale_by_cameamp(g, old, age, config, extent.means)
    eta = call.rates(g.device)
    eta_rows = eta.rows(old.get("lr_mask"), direction.kappa)
    delta = direction.d.mul_(-eta_rows)
    walk = None
    if call.searching:
        kept = old["walk"] * call.kept(g.device)
        walk = new_walk(kept, delta, extent.means, batch.rounding_key(Slot.walk))
        walk = torch.where(spread(ok, walk), walk, kept)
    if config.weight_decay != 0:
        delta.sub_((w * direction.b).mul_(eta.array * config.weight_decay))
    # An infinite weight would become NaN if its decay is infinite or 0 · ∞.  With a finite update it stays.
    delta.nan_to_num_(0.0)

    new = {"age": new_age} | stage_states | direction.states
    cast = None
    if "last_polarity" in stored:
        if call.voting:
            last_signs = extent.signs(stored["last_polarity"], g)
            cast = vote(g, last_signs, ok & (stored["age"] >= 1), extent.means)
        new["last_polarity"] = extent.updated_polarity(stored["last_polarity"], g)
    found = None
    if walk is not None:
        new["walk"] = walk
        found = evidence(walk, direction.mean_square, g, ok, cast, extent.means)
    call.ballots.append(Ballot(batch, found, cast, old.get("lr_mask")))
    return ok, delta, new
