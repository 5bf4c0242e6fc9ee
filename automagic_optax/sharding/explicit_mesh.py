"""Meshes with Explicit axes, where an array's type says how it is split and every operation must say what it gives.

An update gives what it got: its states are split as they were, its updates as the parameters.  So only the borders of a
transformation need types; inside, the compiler splits the work as on a mesh with Auto axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import auto_axes


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
