"""Fills a fresh optimizer state with values taken from another run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from automagic_core.moving.notes import Notes
from automagic_optax.arrays.containers import flatten_like, pure
from automagic_optax.arrays.leaves import leaf_name, leaves_of
from automagic_optax.cameamp.find_states import map_states, only_state, refuse_masked
from automagic_optax.cameamp.round_to_parameters import RoundToParametersState
from automagic_optax.cameamp.states import (
    WARM_UP_ONLY,
    ArrayState,
    ScaleByCameampState,
    Search,
    gather_states,
    scatter_states,
)
from automagic_optax.stages.clip_by_percentile import ClipByPercentileState
from automagic_optax.stages.encourage_low_rank import EncourageLowRankState
from automagic_optax.stages.suppress_edges import SuppressEdgesState
from automagic_optax.stages.suppress_high_frequencies import SuppressHighFrequenciesState

_STAGES = (ClipByPercentileState, SuppressEdgesState, SuppressHighFrequenciesState, EncourageLowRankState)
_ALL = (ScaleByCameampState, RoundToParametersState, *_STAGES)


class Template:
    """The fresh state ``tx.init(params)``, which `filled` fills.

    Attributes:
        tree: the parameters, without containers.
        names: the dotted name of every parameter.
        fresh: the fresh state, in the containers of the parameters.
        opt_state: the fresh state, without containers.
        state: this optimizer's state in it.
        arrays: the fresh states of every array.

    Raises:
        ValueError: `tx` has not exactly one of this optimizer's states, or that has other arrays than `params`.
    """

    def __init__(self, params: Any, tx: Any) -> None:
        self.tree = pure(params)
        self.names = [leaf_name(leaf.path) for leaf in leaves_of(self.tree)]
        self.fresh = tx.init(params)
        self.opt_state = pure(self.fresh)
        self.state = only_state(self.opt_state, "tx.init(params)")
        self.arrays = arrays_of(self.state, self.tree, "tx.init(params)")

    def filled(self, step: jax.Array, search: Search, arrays: Sequence[ArrayState], learning_rate: jax.Array) -> Any:
        """The whole state with the given step, search, states of arrays and η̂."""
        absent = frozenset(
            name
            for name in ArrayState._fields
            if getattr(self.state, name) is None
            or (name in WARM_UP_ONLY and arrays and all(getattr(array, name) is None for array in arrays))
        )
        state = gather_states(self.tree, step, search, list(arrays), absent, learning_rate)
        filled = map_states(lambda _: state, self.opt_state)

        def counted(part: Any) -> Any:
            # An array of its own: two leaves that are one buffer could not be donated.
            return part._replace(step=jnp.array(step)) if isinstance(part, RoundToParametersState) else part

        return jax.tree.map(counted, filled, is_leaf=_is_ours)


def arrays_of(state: ScaleByCameampState, params: Any, where: str) -> list[ArrayState]:
    """The states of every array.  Raises a ValueError if they do not fit the parameters."""
    try:
        arrays = scatter_states(params, pure(state))
    except ValueError as error:
        raise ValueError(f"{where} has other arrays than params: {error}") from error
    refuse_masked(params, [array.age for array in arrays], where)
    for leaf, array in zip(leaves_of(params), arrays, strict=True):
        shape = array.exp_avg.shape
        if shape != leaf.shape:
            raise ValueError(f"{where} has exp_avg of shape {shape} for {leaf_name(leaf.path)} of shape {leaf.shape}")
    return arrays


def take_over_other_states(filled: Any, source: Any, notes: Notes) -> Any:
    """Takes over the states of the gradient stages, and of transformations chained with this optimizer.

    A stage's state is taken over if both sides have it with the same structure, shapes and dtypes.  The states of other
    transformations are taken over if this holds for all of them.  All other states begin anew.
    """
    source = pure(source)
    theirs = {type(x): x for x in jax.tree.leaves(source, is_leaf=_is_ours) if isinstance(x, _STAGES)}

    def taken_over(part: Any) -> Any:
        if not isinstance(part, _STAGES):
            return part
        found = theirs.pop(type(part), None)
        if found is not None and _types(found) == _types(part):
            return found
        notes.changed(f"{type(part).__name__} begins anew")
        return part

    leaves, structure = jax.tree.flatten(filled, is_leaf=_is_ours)
    leaves = [taken_over(leaf) for leaf in leaves]
    for kind in theirs:
        notes.lost(f"{kind.__name__} is dropped: tx has no such stage")
    mine = [i for i, leaf in enumerate(leaves) if not isinstance(leaf, _ALL)]
    others = [x for x in jax.tree.leaves(source, is_leaf=_is_ours) if not isinstance(x, _ALL)]
    if [_types(leaves[i]) for i in mine] == [_types(x) for x in others]:
        for i, other in zip(mine, others, strict=True):
            leaves[i] = other
    else:
        notes.lost("states of the other transformations in the chain do not correspond and begin anew")
    return jax.tree.unflatten(structure, leaves)


def match(params: Any, tree: Any, what: str) -> list[Any]:
    """The leaves of `tree`, which has one for every parameter.

    Raises:
        ValueError: another structure or other shapes; the message names what differs.
    """
    try:
        leaves = flatten_like(params, tree)
    except ValueError as error:
        raise ValueError(f"{what} has other arrays than params: {error}") from error
    for leaf, value in zip(leaves_of(params), leaves, strict=True):
        shape = getattr(value, "shape", None)
        if shape != leaf.shape:
            found = f"shape {shape}" if shape is not None else f"no array but {type(value).__name__}"
            raise ValueError(f"{what} has {found} for {leaf_name(leaf.path)} of shape {leaf.shape}")
    return leaves


def _is_ours(x: Any) -> bool:
    return isinstance(x, _ALL)


def _types(x: Any) -> Any:
    """Structure, shapes and dtypes of a tree."""
    leaves, structure = jax.tree.flatten(x)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
