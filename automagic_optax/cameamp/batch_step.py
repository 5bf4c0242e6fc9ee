"""The steps of the arrays of one batch (`docs/algorithm.md`, sections 5 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from automagic_core import StatePlan
from automagic_optax.arrays.batches import as_one_call, stack, unstack
from automagic_optax.arrays.in_chunks import chunk_count, in_chunks, runs_in_chunks
from automagic_optax.arrays.usable import is_usable
from automagic_optax.cameamp.array_step import ArrayStep, step_array, taken_whole, with_skips
from automagic_optax.cameamp.known_before import Shared
from automagic_optax.cameamp.learning_rate import Evidence, walk_square
from automagic_optax.cameamp.one_pass import held
from automagic_optax.cameamp.states import ArrayState


class BatchStep(NamedTuple):
    """The result of the steps of one batch; a single array has no leading axis.

    Attributes:
        updates: float32, one for each array, to be added to the parameter.
        states: the new states of each, without `lr_mask`, which waits for the votes of all.
        masks: `lr_mask` of all, as before the step.
        evidence: what the arrays say to the search.
        walk_squares: Σ walk² of each after the step; None without a walk that counts.
        skipped: int32, how many arrays were skipped so far in this call.
    """

    updates: list[jax.Array]
    states: list[ArrayState]
    masks: jax.Array | None
    evidence: Evidence
    walk_squares: jax.Array | None
    skipped: jax.Array


def step_batch(
    g: Any,
    members: Sequence[tuple[jax.Array, ArrayState]],
    plan: StatePlan,
    decayed: bool,
    shared: Shared,
    skipped: jax.Array,
) -> BatchStep:
    """`step_array` of every array of a batch.

    The batch is one call, which begins with stacking its arrays and ends with taking them apart.  Each waits for the
    call before (`skipped`), so the stacked arrays of one batch alone are in memory.

    Args:
        g: the gradients, stacked or as a list; that of a single array as it is.
        members: parameter and states of each array.
        plan, decayed: as for `step_array`.
        shared: what all arrays share.
        skipped: how many arrays were skipped so far in this call.
    """

    def all_of_it(g: Any, members: Any, skipped: jax.Array) -> BatchStep:
        if len(members) == 1:
            w, old = members[0]
            stepped = step_array(g, w, old, plan, decayed, shared, skipped)
        else:
            w, old = stack(members)
            stepped = _step_stacked(stack(g) if isinstance(g, list) else g, w, old, plan, decayed, shared, skipped)
        state, found, squares = stepped.state, stepped.evidence.stepped, None
        if state.walk is not None and found is not None:
            square = walk_square if len(members) == 1 else jax.vmap(walk_square)
            squares = square(state.walk) * jnp.maximum(found, shared.keep)
        several = (stepped.update, state._replace(lr_mask=None))
        apart: list[Any] = [several] if len(members) == 1 else unstack(several, len(members))
        updates, states = map(list, zip(*apart, strict=True))
        return BatchStep(updates, states, state.lr_mask, stepped.evidence, squares, stepped.skipped)

    together: BatchStep = (all_of_it if len(members) == 1 else as_one_call(all_of_it))(g, list(members), skipped)
    return together


def _step_stacked(
    g: jax.Array, w: jax.Array, old: ArrayState, plan: StatePlan, decayed: bool, shared: Shared, skipped: Any
) -> ArrayStep:
    """The steps of one batch: `step_array` with a leading axis on all but `skipped`."""
    plan, none = held(plan, old, shared.config), jnp.zeros([], jnp.int32)

    def one(g: jax.Array, w: jax.Array, old: ArrayState) -> ArrayStep:
        return with_skips(is_usable(g, shared.gradient_limit), taken_whole(g, w, old, none, plan, decayed, shared), old)

    some = jax.vmap(one)

    count = chunk_count(g.shape[0], plan.size) if runs_in_chunks(g) else 1
    if count == 1:
        taken = some(g, w, old)
        return ArrayStep(*taken[:3], skipped + jnp.sum(taken.skipped))
    blank = jax.eval_shape(some, g, w, old)
    # What was read is written in place; of the rest only shapes are known.
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (blank.evidence, blank.skipped))
    into = ArrayStep(g.astype(jnp.float32), old, *rest)
    cut: ArrayStep = in_chunks(lambda _, chunk: (some(*chunk), ()), count, (g, w, old), into)[0]
    return cut._replace(skipped=skipped + jnp.sum(cut.skipped))
