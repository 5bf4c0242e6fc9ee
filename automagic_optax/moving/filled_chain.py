"""Fills a fresh optimizer state with values taken from another run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from automagic_core.moving.notes import Notes
from automagic_optax.arrays.containers import flatten_like, pure, unflatten_like
from automagic_optax.arrays.leaves import leaf_name, leaves_of
from automagic_optax.cameamp.find_states import only_state, refuse_masked
from automagic_optax.cameamp.round_to_parameters import RoundToParametersState
from automagic_optax.cameamp.states import (
    WARM_UP_ONLY,
    ArrayState,
    ScaleByCameampState,
    Search,
    gather_states,
    scatter_states,
)
from automagic_optax.moving.edge_histories import EdgeHistory, edge_histories
from automagic_optax.stages.clip_by_percentile import ClipByPercentileState
from automagic_optax.stages.encourage_low_rank import EncourageLowRankState
from automagic_optax.stages.suppress_edges import SuppressEdgesState
from automagic_optax.stages.suppress_high_frequencies import SuppressHighFrequenciesState

_STAGES = (ClipByPercentileState, SuppressEdgesState, SuppressHighFrequenciesState, EncourageLowRankState)
_ALL = (ScaleByCameampState, RoundToParametersState, *_STAGES)

Stage = TypeVar("Stage")


def own_stages(opt_state: Any, kind: type[Stage]) -> list[Stage]:
    """The states of the optimizer's own stages of one class: none or one, or more in a chain made by hand."""
    return [part for part, own in _parts(opt_state) if own and isinstance(part, kind)]


def own_edges(opt_state: Any) -> SuppressEdgesState | None:
    """The state of the optimizer's own stage 2; None without it, and where there are several."""
    found = own_stages(opt_state, SuppressEdgesState)
    return found[0] if len(found) == 1 else None


def _parts(opt_state: Any) -> list[tuple[Any, bool]]:
    """All states, and whether each is one of the optimizer's own stages.

    These come before its state in the tuple that `automagic_8bit` made, which also rounds to parameters.  What a user
    chained around that tuple belongs to another transformation.  In a chain by hand they come anywhere before its
    state.
    """
    found = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_ours)
    position, path = next((i, path) for i, (path, x) in enumerate(found) if isinstance(x, ScaleByCameampState))
    depth = max((i for i, key in enumerate(path) if isinstance(key, jax.tree_util.SequenceKey)), default=0)
    if not any(isinstance(x, RoundToParametersState) and other[:depth] == path[:depth] for other, x in found):
        depth = 0
    return [
        (part, i < position and isinstance(part, _STAGES) and other[:depth] == path[:depth])
        for i, (other, part) in enumerate(found)
    ]


class Template:
    """The fresh state ``tx.init(params)``, which `filled` fills.

    Attributes:
        tree: the parameters, without containers.
        names: the dotted name of every parameter.
        fresh: the fresh state, in the containers of the parameters.
        opt_state: the fresh state, without containers.
        state: this optimizer's state in it.
        arrays: the fresh states of every array.
        edges: the fresh state of `own_edges`.
        histories: the fresh edge histories of every array.

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
        self.edges = own_edges(self.opt_state)
        self.histories = edge_histories(self.tree, self.edges)

    def filled(
        self,
        step: jax.Array,
        search: Search,
        arrays: Sequence[ArrayState],
        histories: Sequence[EdgeHistory],
        learning_rate: jax.Array,
    ) -> Any:
        """The whole state with the given step, search, states of arrays, edge histories and η̂."""
        absent = frozenset(
            name
            for name in ArrayState._fields
            if getattr(self.state, name) is None
            or (name in WARM_UP_ONLY and arrays and all(getattr(array, name) is None for array in arrays))
        )
        state = gather_states(self.tree, step, search, list(arrays), absent, learning_rate)

        def filled(part: Any) -> Any:
            if isinstance(part, ScaleByCameampState):
                return state
            if isinstance(part, RoundToParametersState):
                # An array of its own: two leaves that are one buffer could not be donated.
                return part._replace(step=jnp.array(step))
            if isinstance(part, SuppressEdgesState) and part is self.edges:
                return part._replace(
                    age=unflatten_like(self.tree, [x.age for x in histories]),
                    edge_history=unflatten_like(self.tree, [x.history for x in histories]),
                )
            return part

        return jax.tree.map(filled, self.opt_state, is_leaf=_is_ours)


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

    A stage's state is taken over if both sides have it with the same structure, shapes and dtypes: the optimizer's own
    stages from its own, others from others, in their order, if there are as many of the class.  The states of other
    transformations are taken over if this holds for all of them.  All other states begin anew.
    """
    source = pure(source)
    parts = _parts(filled)
    ours = [(type(part), own) for part, own in parts]
    theirs: dict[tuple[type, bool], list[Any]] = {}
    for part, own in _parts(source):
        if isinstance(part, _STAGES):
            theirs.setdefault((type(part), own), []).append(part)
    pairs = {key: iter(found) for key, found in theirs.items() if len(found) == ours.count(key)}
    edges = own_edges(filled)

    def taken_over(part: Any, own: bool) -> Any:
        if not isinstance(part, _STAGES):
            return part
        found = next(pairs.get((type(part), own), iter(())), None)
        if found is not None and _types(found) == _types(part):
            return found
        if part is not edges:  # which has an estimate
            notes.changed(f"{type(part).__name__} begins anew")
        return part

    structure: Any = jax.tree.structure(filled, is_leaf=_is_ours)
    leaves = [taken_over(*x) for x in parts]
    for kind, own in theirs:
        if (kind, own) not in ours:
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
