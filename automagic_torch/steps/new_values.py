"""One step of stacked arrays, as a pure function of their gradients and stored states (docs/algorithm.md, 4 to 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from automagic_core import MAX_STEP, Slot
from automagic_torch.arrays.means import SlabMeans
from automagic_torch.arrays.stacked import chosen, spread
from automagic_torch.arrays.usable import are_usable, finite, usable_or_zero
from automagic_torch.cameamp.equations import scale_by_cameamp
from automagic_torch.cameamp.learning_rate import Evidence, Rates, Vote, evidence, new_walk, vote
from automagic_torch.cameamp.round_to_parameters import updated
from automagic_torch.codec.stored import States
from automagic_torch.sharding.extent import Extent
from automagic_torch.stages.chain import StageArrays

OF_ARRAYS = ("exp_avg_sq_col", "exp_avg_res_col", "age", "skipped_steps", "torque_mean", "background_scale")
"""States that slabs of an array share."""


class Way(NamedTuple):
    """What is computed for a batch."""

    arrays: StageArrays
    extent: Extent
    measures: bool
    """Σ g² is asked for."""
    voting: bool
    """Votes may be cast."""
    searching: bool
    decays: bool
    rounds: bool
    """States are rounded stochastically."""
    shows: bool
    """The updates are asked for."""
    share: float = 1.0
    """This share of the rows of each array is at hand, a slab: `automagic_torch.steps.slabs`."""


class Given(NamedTuple):
    """The tensors of a batch before a step, stacked."""

    g: Tensor
    """The gradients after the stages, zeros for skipped arrays; raw ones of any dtype where `usable` is None."""
    stage_states: States
    """New values of the states of the stages."""
    before: Tensor
    """The parameters."""
    stored: States
    """The states as they are stored."""
    usable: Tensor | None
    """(arrays,) bool: False for arrays that are skipped; None where the gradients have not been looked at yet."""
    rates: Rates
    decay: Tensor | float
    """η̂ · λ_w."""
    kept: Tensor | float
    """What is kept of every walk."""
    votes: Tensor | bool
    """Votes are cast in this step."""
    state_keys: Mapping[tuple[Slot, int], int | Tensor]
    """The keys of the random bits of the states, by slot and size of the whole arrays."""
    parameter_key: int | Tensor | None
    """That of the parameters; None if they are not rounded stochastically."""
    walk_key: int | Tensor
    """That of the signs of the walk."""
    known: Mapping[str, Tensor]
    """What a slab must know of its whole array."""


class New(NamedTuple):
    """What a step gives."""

    after: Tensor
    """The parameters."""
    stored: States
    """New values of the states that change, as they are stored."""
    found: Evidence | None
    cast: Vote | None
    lr_mask: Tensor | None
    """Before this step."""
    square_norm: Tensor | None
    """Σ g² of the gradients, 0-d."""
    shown: Tensor | None
    """The updates in float32, zeros for skipped arrays."""


def new_values(way: Way, given: Given) -> New:
    """One step of stacked arrays.  Nothing that was given is written into."""
    extent, stored, before = way.extent, given.stored, given.before
    ok, delta, new, new_of_search = _moved(way, given)
    key = (lambda slot, size: given.state_keys[slot, size]) if way.rounds else None
    after_step = {
        name: value if way.share < 1 and name in OF_ARRAYS else chosen(ok, value, stored[name])
        for name, value in extent.encoded(new, key).items()
    }
    skipped = stored["skipped_steps"]
    after_step["skipped_steps"] = skipped + (~ok & (skipped < MAX_STEP))
    shown = torch.where(spread(ok, delta), delta, 0.0) if way.shows else None
    after = updated(before, delta, ok, given.parameter_key)
    return New(after, after_step, *new_of_search, shown)


def written_back(way: Way, given: Given, new: New) -> States:
    """Writes new parameters and states into what was given, but for the states that slabs share, which it returns."""
    given.before.copy_(new.after)
    shares: States = {}
    for name, value in new.stored.items():
        if way.share < 1 and name in OF_ARRAYS:
            shares[name] = value
        else:
            given.stored[name].copy_(value)
    return shares


def _moved(
    way: Way, given: Given
) -> tuple[Tensor, Tensor, States, tuple[Evidence | None, Vote | None, Tensor | None, Tensor | None]]:
    """Which arrays are not skipped, their updates in float32, the new values of their states, and what `New` says.

    This is a function of its own so that its many temporary arrays are freed on return.
    """
    extent, config, stored = way.extent, way.arrays.config, given.stored
    means = extent.means if way.share == 1 else SlabMeans(extent.plan, way.share, given.known)
    g, ok = given.g.float(), given.usable
    seen = g
    if ok is None:
        ok = given.known["usable"] if way.share < 1 else are_usable(g)
        g = usable_or_zero(g, ok)
    if not g.is_cuda:  # a GPU reads raw gradients once for this and their means
        seen = g
    squares = means.squares(seen.square()) if extent.plan.factored_sq else None
    if squares is not None and seen is not g:
        squares = usable_or_zero(squares[0], ok), usable_or_zero(squares[1], ok)
    square_norm = None
    if way.measures:
        square_norm = means.square_norm(g) if squares is None else squares[0].sum() * extent.plan.columns
    w = given.before.float()
    old = extent.read(stored)
    new_age = old["age"] + (old["age"] < MAX_STEP)
    age = new_age.float()

    direction = scale_by_cameamp(g, squares, old, age, config, means)
    eta_rows = given.rates.rows(old.get("lr_mask"), direction.kappa)
    delta = direction.d.mul_(-eta_rows)
    walk = None
    if way.searching:
        kept = old["walk"] * given.kept
        walk = new_walk(kept, delta, extent.means, given.walk_key)
        walk = torch.where(spread(ok, walk), walk, kept)
    if way.decays:
        delta.sub_((w * direction.b).mul_(given.decay))
    # An infinite weight would become NaN if its decay is infinite or 0 · ∞.  With a finite update it stays.
    delta = finite(delta)

    new = {"age": new_age} | given.stage_states | direction.states
    cast = None
    if way.voting:
        cast = vote(g, old["exp_avg"], ok & (stored["age"] >= 1) & given.votes, extent.means)
    found = None
    if walk is not None:
        new["walk"] = walk
        found = evidence(walk, direction.mean_square, g, ok, cast, extent.means)
    return ok, delta, new, (found, cast, old.get("lr_mask"), square_norm)
