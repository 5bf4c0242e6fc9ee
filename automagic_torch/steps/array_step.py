"""Updates one batch: gradients, states and parameters (docs/algorithm.md, sections 4 to 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from automagic_core import MAX_STEP, Slot
from automagic_torch.arrays.stacked import stacked
from automagic_torch.arrays.usable import gradients, usable_or_zero
from automagic_torch.cameamp.call import Ballot, Batch
from automagic_torch.cameamp.round_to_parameters import HALF_DTYPES, written
from automagic_torch.codec.stored import States
from automagic_torch.sharding.extent import Extent
from automagic_torch.stages.chain import StageInputs
from automagic_torch.stages.energy import StageEnergy
from automagic_torch.steps.held_stacks import HeldStacks, can_hold
from automagic_torch.steps.new_values import Given, New, Way, new_values, written_back
from automagic_torch.steps.slabs import rows_of_slab, run_in_slabs, slab_size

OnUpdate = Callable[[Tensor, Tensor], None]


def update_batch(
    batch: Batch, energy: StageEnergy, on_update: OnUpdate | None, held: HeldStacks, *, compiled: bool = False
) -> None:
    """Updates the states and parameters of a batch, and adds its ballot to its call.

    Args:
        batch: the batch.
        energy: records the gradients before and after every stage.
        on_update: is called with every parameter and its update in float32, before the parameter changes.
        held: the stacked states of compiled batches.
        compiled: by a compiled function, if the arrays are whole in this process.
    """
    call, extent, config = batch.call, batch.extent, batch.call.config
    compiled = compiled and type(extent) is Extent
    params = list(extent.here(batch.params))
    before = stacked(params)
    stack = batch.stack if compiled and can_hold(batch) else None
    if stack is not None:
        held.keep(batch)
    stored = stack or {
        name: stacked(extent.states_here([state[name] for state in batch.states], before.device))
        for name in sorted(batch.names)  # in one order in every process, for caches of compilers
    }
    grads = stacked(extent.gradients_here(gradients(batch.params)))
    factor = call.clipping_factor(before.device)
    # Stages 3 and 4 are calls of libraries, of which a compiler makes nothing better.
    raw = compiled and factor is None and not batch.arrays.changed
    g, usable, stage_states = (grads, None, {}) if raw else _after_stages(batch, grads, before, stored, factor, energy)
    del grads
    way = Way(
        arrays=batch.arrays,
        extent=extent,
        measures=raw and energy.measures,
        # A compiled function is the same at the first step.
        voting=config.votes and call.warming if compiled else call.voting,
        searching=call.searching,
        decays=isinstance(config.weight_decay, Tensor) or config.weight_decay != 0,
        rounds=config.stochastic_rounding,
        shows=on_update is not None,
    )
    rates = call.rates(before.device)
    rounded = config.stochastic_rounding_params and before.dtype in HALF_DTYPES
    given = Given(
        g=g,
        before=before,
        stored=stored,
        stage_states=stage_states,
        usable=usable,
        rates=rates,
        decay=rates.array * config.weight_decay,
        kept=call.kept(before.device),
        votes=call.voting,
        state_keys={where: batch.state_key(*where) for where in batch.random_states},
        parameter_key=batch.rounding_key(Slot.parameters) if rounded else None,
        walk_key=batch.rounding_key(Slot.walk),
        known={},
    )
    new = _run(batch, way, given, compiled)
    if compiled and can_hold(batch) and stack is None:
        held.hold(batch, given.stored)
    call.ballots.append(Ballot(batch, new.found, new.cast, new.lr_mask))
    if new.square_norm is not None:
        energy.unchanged(new.square_norm)
    if new.shown is not None and on_update is not None:
        for p, update in zip(batch.params, extent.like_parameters(new.shown), strict=True):
            on_update(p, update)
    if not _is_view(new.after, params):
        written(params, new.after)


def _after_stages(
    batch: Batch, grads: Tensor, before: Tensor, stored: States, factor: Tensor | None, energy: StageEnergy
) -> tuple[Tensor, Tensor, States]:
    """The gradients after the stages, zeros for skipped arrays; which arrays are usable; the states of the stages."""
    g = grads.float()
    ok = batch.usable(g)
    age = stored["age"] + (stored["age"] < MAX_STEP)
    age = age.float().view(-1, *[1] * (g.ndim - 1))
    inputs = StageInputs(factor, usable_or_zero(g, ok), before.float(), stored.get("edge_history"), age)
    g, states = batch.extent.after_stages(batch.arrays, inputs, energy)
    return g, ok, states


def _run(batch: Batch, way: Way, given: Given, compiled: bool) -> New:
    """The new values; those of the states replace the old ones."""
    rows = None
    if type(batch.extent) is Extent and len(batch.states) == 1 and not way.shows:
        # Compiled slabs are of one size: another would be another function.
        rows = rows_of_slab(batch.plan, slab_size(given.before.device.type, compiled), equal=compiled)
    if not compiled and rows is None:
        new = new_values(way, given)
        for name, value in new.stored.items():
            batch.extent.replace(batch.states, name, value)
        return new
    run: Callable[[Way, Given], New] = _written_back
    if compiled:
        from automagic_torch.steps.compiled import run_compiled as run
    if rows is not None:
        return _in_place(batch, way, given, lambda way, given: run_in_slabs(way, given, rows, run))
    return _in_place(batch, way, given, run)


def _written_back(way: Way, given: Given) -> New:
    """Eager `new_values` of a slab, which writes into what it is given."""
    new = new_values(way, given)
    return new._replace(after=given.before, stored=written_back(way, given, new))


def _in_place(batch: Batch, way: Way, given: Given, run: Callable[[Way, Given], New]) -> New:
    """Runs what writes new states into the old ones' memory, or into copies where somebody else holds it.

    What was given for several arrays is such a copy, and so is what was brought from another device.
    """
    alone, here = len(batch.states) == 1, batch.extent.state_device is None
    brought = batch.extent.state_device not in (None, given.before.device)
    if alone and not brought and not batch.in_place:
        given = given._replace(stored={name: x.clone() for name, x in given.stored.items()})
    if way.shows:
        given = given._replace(before=given.before.clone())
    new = run(way, given)
    for name, value in new.stored.items():
        # Stacking copies a state of somebody's that is not contiguous, and the copy was written.
        if not here or (alone and not (batch.in_place and _is_view(value, [batch.states[0][name]]))):
            batch.extent.replace(batch.states, name, value)
    return new


def _is_view(stack: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether a stack is the memory of the one tensor in it, and no copy."""
    return len(tensors) == 1 and stack.data_ptr() == tensors[0].data_ptr()
