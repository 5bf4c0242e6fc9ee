"""What every transformation does around its update: it keeps the types of arrays, and the structure of its state.

On meshes with Explicit axes types say how arrays are split.  Inside ``jax.shard_map`` they say along which axes arrays
may differ: a state may wherever any parameter does, since after an update even counts depend on the gradients.

An update keeps shardings: states stay split as they were, and updates are split as the parameters.  So only what goes
in and comes out needs types.  Inside, the compiler splits the work as on a mesh with Auto axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from automagic_optax.arrays.alike import remembered_shardings
from automagic_optax.arrays.containers import held_like
from automagic_optax.arrays.own_rules import under_own_rules
from automagic_optax.sharding.explicit_mesh import untyped
from automagic_optax.sharding.placement import has_explicit_axes, varying_axes, varying_over


def with_types(
    tx: optax.GradientTransformationExtraArgs,
    anew: Callable[[Any], optax.GradientTransformationExtraArgs] | None = None,
    hyperparameters: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation, under `own_rules`, for arrays with or without types and containers.

    After an update every leaf of the state has the type and the container that it had before, and an update has the
    type of its parameter (of its gradient, where no parameters are given).  Gradients that differ along other axes of
    ``jax.shard_map`` than the state make that of the state wider, as in optax.

    Args:
        tx: the transformation.
        anew: makes `tx` from hyperparameters.  It is needed where some of these are arrays with types (as
            ``optax.inject_hyperparams`` makes them), since those must be passed in as arguments too.
        hyperparameters: what `tx` was made with.
    """

    def init(params: Any) -> Any:
        state, axes = tx.init(params), varying_axes(params)
        return jax.tree.map(lambda x: varying_over(axes, x), state) if axes else state

    def kept(tx: Any, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> Any:
        new_updates, new_state = tx.update(updates, state, params, **extra_args)
        return new_updates, held_like(state, new_state)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        new_updates, new_state = split_alike(updates, state, params, extra_args)
        if varying_axes(state):  # some leaves are made anew, of constants
            new_state = jax.tree.map(lambda old, new: varying_over(varying_axes(old), new), state, new_state)
        return new_updates, new_state

    def split_alike(updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> Any:
        typed_values = any(map(has_explicit_axes, jax.tree.leaves(hyperparameters)))
        arguments = (updates, state, params, extra_args, hyperparameters if typed_values else None)
        if not any(map(has_explicit_axes, jax.tree.leaves(arguments))):
            return kept(tx, updates, state, params, extra_args)
        like = updates if params is None else _in_place_of(params, updates)
        with remembered_shardings(updates if params is None else params):
            return untyped(
                lambda u, s, p, extra, values: kept(
                    anew(values) if typed_values and anew is not None else tx, u, s, p, extra
                ),
                (_types(like, arguments), _types(state, arguments)),
            )(*arguments)

    return under_own_rules(optax.GradientTransformationExtraArgs(init, update))


def _in_place_of(params: Any, updates: Any) -> Any:
    """The parameters where there are updates, None where there are none."""
    holes = jax.tree.leaves(updates, is_leaf=lambda x: x is None)
    leaves, structure = jax.tree.flatten(params)
    if len(holes) != len(leaves):
        return updates
    return jax.tree.unflatten(structure, [None if u is None else w for u, w in zip(holes, leaves, strict=True)])


def _types(tree: Any, arguments: Any) -> Any:
    """The sharding in each leaf's type; a leaf without one is whole on the mesh of the arguments."""
    typed = [leaf for leaf in jax.tree.leaves(arguments) if has_explicit_axes(leaf)]
    mesh = jax.typeof(typed[0]).sharding.mesh

    def one(x: Any) -> NamedSharding:
        spec = jax.typeof(x).sharding.spec if has_explicit_axes(x) else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(one, tree)
