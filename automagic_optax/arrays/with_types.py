"""Transformations for meshes with Explicit axes: what goes in and what comes out has types that say how it is split.

An update gives what it got: its states are split as they were, its updates as the parameters.  So only the borders of a
transformation need types; inside, the compiler splits the work as on a mesh with Auto axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from automagic_optax.arrays.alike import told_shardings
from automagic_optax.sharding.explicit_mesh import untyped
from automagic_optax.sharding.placement import has_explicit_axes


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
