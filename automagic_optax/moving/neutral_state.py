"""Converts the state of `automagic_8bit` to the neutral form of a run and back (`docs/algorithm.md`, section 11.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Config, Layout, check_layout, state_plan
from automagic_core.arrays.axes import inverse_axes, transposed_shape
from automagic_core.arrays.state_forms import SEARCH_SCALARS, WARM_UP_ONLY
from automagic_core.moving.neutral import Axes, NeutralArray, NeutralGroup, axes_of, check_group, in_layout
from automagic_core.moving.notes import Notes
from automagic_optax.arrays.containers import pure, unflatten_like
from automagic_optax.arrays.leaves import leaf_name, leaves_of
from automagic_optax.arrays.marks import Mark, resolve_mark
from automagic_optax.cameamp.find_states import only_state, refuse_masked, refuse_several
from automagic_optax.cameamp.round_to_parameters import RoundToParametersState
from automagic_optax.cameamp.states import WARM_UP_ONLY as WARM_UP_FIELDS
from automagic_optax.cameamp.states import (
    ArrayState,
    ScaleByCameampState,
    Search,
    absent_states,
    array_state,
    flat_fields,
    gather_states,
    scatter_states,
)
from automagic_optax.codec.quantized_array import QuantizedArray
from automagic_optax.moving.edge_histories import edge_histories, of_the_array
from automagic_optax.moving.filled_chain import Stage, own_stages
from automagic_optax.moving.torch_names import Names, torch_indices
from automagic_optax.optimizer import automagic_8bit
from automagic_optax.stages.clip_by_percentile import ClipByPercentileState
from automagic_optax.stages.suppress_edges import SuppressEdgesState

RINGS = ("norm_history", "norm_position")


def continued(
    group: NeutralGroup,
    params: Any,
    names: Names,
    layout: Layout,
    axes: Axes | None,
    *,
    lora: Mark,
    embedding: Mark,
    label: str,
    notes: Notes,
) -> Any:
    """The state of ``automagic_8bit(..., layout=layout)`` that goes on with a group.

    Args:
        group: the run in neutral form.
        params: the parameters in JAX.
        names: which leaf is which array (`torch_indices`).
        layout: of `params`.
        axes: permutations from the group's arrays to the leaves, by the leaves' dotted paths.
        lora, embedding: as for ``automagic_8bit``.
        label: the group's name in errors.
        notes: collects what is lost.

    Raises:
        ValueError: something does not fit; the message names the leaf.
    """
    check_layout(layout)
    matched = _matched(group, params, names, layout, axes, embedding, label)
    check_group(matched, label)
    if layout != group.layout or axes:
        matched, _ = in_layout(matched, layout, axes, notes)
    return _opt_state(matched, params, lora, embedding)


def group_of(
    opt_state: Any,
    params: Any,
    fields: Mapping[str, Any],
    layout: Layout,
    *,
    lora: Mark,
    embedding: Mark,
) -> NeutralGroup:
    """The neutral form of a state, its arrays under their dotted paths.

    Args:
        opt_state: holds one state of ``automagic_8bit(..., layout=layout)``.
        params: the parameters.
        fields: hyperparameters by name, `warmup_steps` among them.
        layout, lora, embedding: as for ``automagic_8bit``.

    Raises:
        ValueError: there is not exactly one such state, or it is of several members (``jax.vmap``).
    """
    state = pure(only_state(opt_state, "opt_state"))
    refuse_several(state.step)
    warming = int(state.step) < fields["warmup_steps"]
    leaves = leaves_of(params)
    marks = zip(resolve_mark(embedding, params, "embedding"), resolve_mark(lora, params, "lora"), strict=True)
    arrays = [
        NeutralArray(
            leaf_name(leaf.path),
            leaf.shape,
            is_embedding,
            is_lora,
            {name: np.asarray(value) for name, value in states.items() if warming or name not in WARM_UP_ONLY},
        )
        for leaf, (is_embedding, is_lora), states in zip(
            leaves, marks, flat_states(opt_state, params, fields["betas"]), strict=True
        )
    ]
    shared = {name: getattr(state, name) for name in SEARCH_SCALARS}
    if (clipped := _own_stage(opt_state, ClipByPercentileState)) is not None:
        shared |= {name: getattr(clipped, name) for name in RINGS}
    return NeutralGroup(
        fields=fields,
        layout=layout,
        step=int(state.step),
        shared={name: np.asarray(value) for name, value in shared.items()},
        arrays=tuple(arrays),
        named=True,
    )


def blocks_of(opt_state: Any) -> dict[str, int]:
    """`block_size` as the states have it; empty where none has blocks.

    Raises:
        ValueError: there is not exactly one state of this optimizer, or it has blocks of different sizes.
    """
    state = pure(only_state(opt_state, "opt_state"))
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QuantizedArray))
    blocks = {x.block_size for x in leaves if isinstance(x, QuantizedArray) and x.block_size is not None}
    if len(blocks) > 1:
        raise ValueError(f"opt_state has blocks of different sizes, {sorted(blocks)}: `requantized` gives them one")
    return {"block_size": blocks.pop()} if blocks else {}


def flat_states(opt_state: Any, params: Any, betas: Sequence[float] = Config.betas) -> list[dict[str, Any]]:
    """The states of each array by their flat names, with `edge_history` as the array's age has it."""
    arrays = scatter_states(params, pure(only_state(opt_state, "opt_state")))
    refuse_masked(params, [array.age for array in arrays], "opt_state")
    found = [flat_fields(array) for array in arrays]
    edges = edge_histories(params, _own_stage(opt_state, SuppressEdgesState))
    for fields, array, held in zip(found, arrays, edges, strict=True):
        if held.history is not None:
            fields["edge_history"] = of_the_array(held, int(array.age), array.exp_avg_sq, betas[1])
    return found


def _own_stage(opt_state: Any, kind: type[Stage]) -> Stage | None:
    """The state of the optimizer's own stage, or None.  Raises a ValueError if a chain by hand has several."""
    found = own_stages(pure(opt_state), kind)
    if len(found) > 1:
        raise ValueError(
            f"opt_state has {len(found)} {kind.__name__} before ScaleByCameampState; only one of them can be carried"
        )
    return found[0] if found else None


def _matched(
    group: NeutralGroup, params: Any, names: Names, layout: Layout, axes: Axes | None, embedding: Mark, label: str
) -> NeutralGroup:
    """The group with its arrays in the order of the leaves, under their names and with their marks."""
    check_layout(group.layout)
    positions = torch_indices(params, [array.name for array in group.arrays], group.named, names)
    marks = resolve_mark(embedding, params, "embedding")
    matched = [
        (dataclasses.replace(theirs, name=leaf_name(leaf.path), shape=leaf.shape, embedding=mark), theirs)
        for leaf, theirs, mark in zip(
            leaves_of(params), (group.arrays[position] for position in positions), marks, strict=True
        )
    ]

    def shape_there(array: NeutralArray, layout: Layout) -> Any:
        order = axes_of(array, group.layout, layout, (axes or {}).get(array.name))
        assert array.shape is not None
        return transposed_shape(array.shape, inverse_axes(order))

    arrays = []
    for array, theirs in matched:
        shape = shape_there(array, layout)
        if theirs.shape not in (None, shape):
            other: Layout = "torch" if layout == "flax" else "flax"
            if all(x.shape in (None, shape_there(ours, other)) for ours, x in matched):
                why = f"all shapes fit with layout={other!r}"
            else:
                why = "names=, embedding= or axes= may be wrong"
            raise ValueError(
                f"{array.name} of shape {array.shape} with layout {layout!r} has shape {shape} with {label}'s layout "
                f"{group.layout!r}, but {theirs.name!r} there has {theirs.shape}: {why}"
            )
        arrays.append(dataclasses.replace(array, shape=shape))
    return dataclasses.replace(group, arrays=tuple(arrays), named=True)


def _opt_state(group: NeutralGroup, params: Any, lora: Mark, embedding: Mark) -> Any:
    """The state for a group whose arrays are the leaves of `params`."""
    config, step = group.config, jnp.asarray(group.step, jnp.int32)
    arrays: list[ArrayState] = []
    edge_history: list[jax.Array | None] = []
    for array in group.arrays:
        assert array.shape is not None
        plan = state_plan(array.shape, config, group.layout, embedding=array.embedding)
        history = array.states.get("edge_history", np.zeros(plan.row_shape, np.float32))
        edge_history.append(jnp.array(history) if plan.has_edge_history else None)
        arrays.append(array_state(array.states, plan, group.warming))
    gone = {name for name in WARM_UP_FIELDS if arrays and all(getattr(array, name) is None for array in arrays)}
    absent = absent_states(config) | gone
    search = Search(**{name: jnp.array(group.shared[name]) for name in SEARCH_SCALARS})
    state = gather_states(params, step, search, arrays, absent, jnp.zeros([], jnp.float32))
    # Arrays of their own: two leaves that are one buffer could not be donated.
    ages = jax.tree.map(jnp.array, state.age)
    stages = {
        SuppressEdgesState: {"age": ages, "edge_history": unflatten_like(params, edge_history)},
        ClipByPercentileState: {name: jnp.array(group.shared[name]) for name in RINGS if name in group.shared},
        RoundToParametersState: {"step": jnp.array(step)},
    }
    fields = {name: value for name, value in config.__dict__.items() if name not in ("lr", "weight_decay", "profile")}
    tx = automagic_8bit(config.min_lr, layout=group.layout, lora=lora, embedding=embedding, **fields)
    template = jax.eval_shape(tx.init, params)

    def filled(part: Any) -> Any:
        if isinstance(part, ScaleByCameampState):
            return state
        # What describes only the last step begins anew.
        fresh = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), part)
        return fresh._replace(**stages[type(part)]) if type(part) in stages else fresh

    return tuple(filled(part) for part in template)
