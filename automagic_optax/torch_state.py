"""Carries an optimizer state from PyTorch to JAX and back, bit for bit.

The layout stays: a state saved with ``layout="torch"`` goes on with ``automagic_8bit(..., layout="torch")``.  States
are taken in the form in which they are stored, 8 or 32 bits, with or without what only the warm-up needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import FIELD_NAMES, Config, StatePlan, state_plan
from automagic_optax.cameamp_state import (
    ArrayState,
    ScaleByCameampState,
    gather_states,
    initial_state,
    scatter_states,
)
from automagic_optax.clip_by_percentile import ClipByPercentileState
from automagic_optax.flax_variables import flatten_like, unflatten_like
from automagic_optax.leaves import leaf_name
from automagic_optax.marks import Mark, resolve_mark
from automagic_optax.optimizer import automagic_8bit
from automagic_optax.round_to_parameters import RoundToParametersState
from automagic_optax.suppress_edges import SuppressEdgesState
from automagic_optax.torch_names import torch_indices
from automagic_optax.torch_tensors import Fields, flat_fields, unflat_fields

Part = TypeVar("Part")


def from_torch_state(
    state_dict: Mapping[str, Any], params: Any, *, names: Any = None, lora: Mark = None, embedding: Mark = None
) -> Any:
    """The state of ``automagic_8bit`` that continues a PyTorch run.

    Args:
        state_dict: ``optimizer.state_dict()`` of an `AutomagicCameAMP8bit` with one parameter group.
        params: the parameters in JAX, in the layout that the state dict names.
        names: a tree like `params` of PyTorch names or positions.  Without it dotted paths are matched with the names
            of an optimizer that was built from named parameters, and a list of arrays is taken by position.
        lora, embedding: as for ``automagic_8bit``.

    Returns:
        What ``automagic_8bit(lr, layout=..., **fields).init(params)`` returns for the state's own hyperparameters, with
        its values.

    Raises:
        ValueError: the state does not fit; the message names the parameter, the state and what differs.
    """
    group = _only_group(state_dict)
    config = _config(group)
    lr_scale = jnp.asarray(_as_numpy(group["lr_scale"]), jnp.float32)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    marks = resolve_mark(embedding, params, "embedding")
    keys = torch_indices(params, group, names)

    warming = int(group["step"]) < config.warmup_steps
    arrays, edge_history = [], []
    for (path, leaf), key, mark in zip(leaves, keys, marks, strict=True):
        plan = state_plan(leaf.shape, config, group["layout"], embedding=mark)
        saved = dict(state_dict["state"].get(key) or {})
        edge_history.append(_edge_history(saved, plan, leaf_name(path)))
        arrays.append(_array_state(saved, plan, warming, leaf_name(path)))
    absent = frozenset(
        name for name in ArrayState._fields if arrays and all(getattr(array, name) is None for array in arrays)
    )
    step = jnp.asarray(group["step"], jnp.int32)
    state = gather_states(params, step, lr_scale, arrays, absent)

    stages = {
        SuppressEdgesState: {"age": state.age, "edge_history": unflatten_like(params, edge_history)},
        ClipByPercentileState: _norms(group),
        RoundToParametersState: {"step": step},
    }
    fields = {name: value for name, value in config.__dict__.items() if name not in ("lr", "weight_decay", "profile")}
    tx = automagic_8bit(config.min_lr, layout=group["layout"], lora=lora, embedding=embedding, **fields)
    template = jax.eval_shape(tx.init, params)

    def filled(part: Any) -> Any:
        if isinstance(part, ScaleByCameampState):
            return state
        # What only tells of the last step starts anew.
        fresh = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), part)
        return fresh._replace(**stages[type(part)]) if type(part) in stages else fresh

    return tuple(filled(part) for part in template)


def to_torch_state(opt_state: Any, params: Any, like: Mapping[str, Any], *, names: Any = None) -> dict[str, Any]:
    """A state dict for an `AutomagicCameAMP8bit` that continues a JAX run.  Needs PyTorch.

    Args:
        opt_state: state of ``automagic_8bit``, with ``layout="torch"`` or the layout of the PyTorch optimizer.
        params: the parameters in JAX.
        like: ``optimizer.state_dict()`` of the PyTorch optimizer that is to go on: its one group keeps its
            hyperparameters and takes over `step` and `lr_scale`.
        names: as in `from_torch_state`.

    Returns:
        For ``optimizer.load_state_dict``, which checks it as a whole before it takes anything over.

    Raises:
        ValueError: leaves and parameters do not correspond, or there is not exactly one state of this optimizer.
    """
    import torch

    group = dict(_only_group(like))
    state = _only_state(opt_state)
    keys = torch_indices(params, group, names)
    warming = int(state.step) < group["warmup_steps"]
    # A copy of the bytes: torch does not share memory with an immutable JAX array.
    group["step"] = int(state.step)
    group["lr_scale"] = torch.tensor(np.array(state.lr_scale))
    for clipped in parts_of(opt_state, ClipByPercentileState):
        group["norm_history"] = torch.tensor(np.array(clipped.norm_history))
        group["norm_position"] = torch.tensor(np.array(clipped.norm_position))
    states = {
        key: {
            name: torch.tensor(np.array(value))
            for name, value in fields.items()
            if warming or name not in ("s", "s_absmax", "last_polarity")
        }
        for key, fields in zip(keys, flat_states(opt_state, params), strict=True)
    }
    return {"state": states, "param_groups": [group]}


def flat_states(opt_state: Any, params: Any) -> list[dict[str, Any]]:
    """The states of each array by their PyTorch names, those of the gradient stages among them."""
    found = [flat_fields(array) for array in scatter_states(params, _only_state(opt_state))]
    for edges in parts_of(opt_state, SuppressEdgesState):
        for fields, history in zip(found, flatten_like(params, edges.edge_history), strict=True):
            if history is not None:
                fields["edge_history"] = history
    return found


def parts_of(opt_state: Any, kind: type[Part]) -> list[Part]:
    """The members of a chain's state that are of one type, however they are wrapped."""
    return [x for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind)) if isinstance(x, kind)]


def _only_group(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in ("state", "param_groups"):
        if name not in state_dict:
            raise ValueError(f"the state dict has no {name!r}")
    groups = state_dict["param_groups"]
    if len(groups) != 1:
        raise ValueError(
            f"the state dict has {len(groups)} parameter groups; a transformation has one set of hyperparameters and "
            "one lr_scale, so carry each group by itself (optax.partition)"
        )
    needed = (*FIELD_NAMES, "layout", "step", "lr_scale", "params")
    missing = [name for name in needed if name not in groups[0]]
    if missing:
        raise ValueError(f"the state dict's parameter group lacks {', '.join(missing)}")
    return groups[0]


def _config(group: Mapping[str, Any]) -> Config:
    # A scheduler may have set lr to anything; the state does not depend on it.
    return Config(**{name: group[name] for name in FIELD_NAMES} | {"lr": group["min_lr"]})


def _only_state(opt_state: Any) -> ScaleByCameampState:
    found = parts_of(opt_state, ScaleByCameampState)
    if len(found) != 1:
        raise ValueError(f"expected one ScaleByCameampState in the optimizer state, found {len(found)}")
    return found[0]


def _edge_history(saved: dict[str, Any], plan: StatePlan, name: str) -> jax.Array | None:
    """Taken out of `saved`; zeros where the array took no step yet."""
    if not plan.has_edge_history:
        return None
    if not saved:
        return jnp.zeros(plan.row_shape, jnp.float32)
    if "edge_history" not in saved:
        raise ValueError(f"the state of {name} lacks edge_history")
    history = _as_numpy(saved.pop("edge_history"))
    if (history.shape, history.dtype) != (plan.row_shape, np.float32):
        raise ValueError(
            f"the state of {name} has edge_history of shape {history.shape} and {history.dtype}; "
            f"expected {plan.row_shape} and float32"
        )
    return jnp.asarray(history)


def _norms(group: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The ring of stage 1, where the group has one."""
    return {name: jnp.asarray(_as_numpy(group[name])) for name in ("norm_history", "norm_position") if name in group}


def _array_state(saved: Mapping[str, Any], plan: StatePlan, warming: bool, name: str) -> ArrayState:
    if not saved:  # the parameter took no step yet
        array = initial_state(plan)
        return array if warming else array._replace(s=None, last_polarity=None)
    stored: Fields = {key: _as_numpy(value) for key, value in saved.items()}
    return unflat_fields(stored, plan, warming, name)


def _as_numpy(value: Any) -> np.ndarray:
    # A tensor, wherever it lives; PyTorch itself is not needed for that.
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
