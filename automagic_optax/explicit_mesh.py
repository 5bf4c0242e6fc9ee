"""Meshes with Explicit axes, where an array's type says how it is split and every operation must say what it gives.

An update gives what it got: its states are split as they were, its updates as the parameters.  So only the borders of a
transformation need types; inside, the compiler splits the work as on a mesh with Auto axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, auto_axes

from automagic_optax.placement import has_explicit_axes, told_shardings


def with_types(
    tx: optax.GradientTransformationExtraArgs,
    anew: Callable[[Any], optax.GradientTransformationExtraArgs] | None = None,
    hyperparameters: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation for arrays with and without types that tell how they are split.

    After an update the type of every leaf of the state is what it was before, and that of an update is its parameter's,
    or its gradient's where no parameters are given.

    Args:
        tx: the transformation.
        anew: makes it from hyperparameters; where some of them are arrays with types (``optax.inject_hyperparams``
            makes them so), they must come in as arguments too.
        hyperparameters: what `tx` was made with.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        typed_values = any(map(has_explicit_axes, jax.tree.leaves(hyperparameters)))
        arguments = (updates, state, params, extra_args, hyperparameters if typed_values else None)
        if not any(map(has_explicit_axes, jax.tree.leaves(arguments))):
            return tx.update(updates, state, params, **extra_args)
        like = updates if params is None else _in_place_of(params, updates)
        with told_shardings(updates if params is None else params):
            return untyped(
                lambda u, s, p, extra, values: (anew(values) if typed_values and anew is not None else tx).update(
                    u, s, p, **extra
                ),
                (_types(like, arguments), _types(state, arguments)),
            )(*arguments)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def untyped(function: Callable[..., Any], shardings: Any) -> Callable[..., Any]:
    """The function, inside of which types do not tell how arrays are split; its results are split as told.

    Args:
        function: of trees, of which leaves that are no arrays are passed as they are.
        shardings: a tree of the structure of what it returns.
    """

    def call(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

        def inside(arrays: list[jax.Array]) -> Any:
            rest = iter(arrays)
            filled = [next(rest) if here else leaf for leaf, here in zip(leaves, is_array, strict=True)]
            return function(*jax.tree.unflatten(structure, filled))

        arrays = [leaf for leaf, here in zip(leaves, is_array, strict=True) if here]
        return auto_axes(inside, out_sharding=shardings)(arrays)

    return call


def _in_place_of(params: Any, updates: Any) -> Any:
    """The parameters where there are updates, None where there are none."""
    holes = jax.tree.leaves(updates, is_leaf=lambda x: x is None)
    leaves, structure = jax.tree.flatten(params)
    if len(holes) != len(leaves):
        return updates
    return jax.tree.unflatten(structure, [None if u is None else w for u, w in zip(holes, leaves, strict=True)])


def _types(tree: Any, arguments: Any) -> Any:
    """The sharding in each leaf's type; whole on the mesh of the arguments where the type has none."""
    typed = [leaf for leaf in jax.tree.leaves(arguments) if has_explicit_axes(leaf)]
    mesh = jax.typeof(typed[0]).sharding.mesh

    def one(x: Any) -> NamedSharding:
        spec = jax.typeof(x).sharding.spec if has_explicit_axes(x) else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(one, tree)
