"""Makes functions work on meshes with Explicit axes, where an array's type says how it is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import auto_axes


def untyped(function: Callable[..., Any], shardings: Any) -> Callable[..., Any]:
    """The function, run as on a mesh with Auto axes instead of Explicit; its results then get the given shardings.

    Args:
        function: takes trees.  Leaves that are no arrays are passed as they are.
        shardings: a tree in the structure of what it returns.
    """

    def call(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

        def inside(arrays: list[jax.Array]) -> Any:
            rest = iter(arrays)
            filled = [next(rest) if here else leaf for leaf, here in zip(leaves, is_array, strict=True)]
            return function(*jax.tree.unflatten(structure, filled))

        arrays = [leaf for leaf, here in zip(leaves, is_array, strict=True) if here]
        # Named, since an axis that ``jax.shard_map`` has made Manual must stay so.
        axes = {name: None for x in arrays for name in jax.typeof(x).sharding.mesh.explicit_axes}
        return auto_axes(inside, axes=tuple(axes), out_sharding=shardings)(arrays)

    return call
