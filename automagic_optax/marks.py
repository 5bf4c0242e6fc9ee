"""Boolean marks on the leaves of a parameter tree: which arrays are embeddings, adapters, or decayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import keystr, tree_flatten_with_path

Mark = Callable[[tuple, Any], bool] | Any | None
"""A predicate on (path, leaf), a tree of booleans (or a prefix of one), or None."""


def leaf_name(path: tuple) -> str:
    """A leaf's path as a person would write it: ``layer.kernel``."""
    return keystr(path, simple=True, separator=".") or "the parameter"


def resolve_mark(mark: Mark, params: Any, what: str, default: bool = False) -> list[bool]:
    """One boolean for each leaf of `params`, in order.

    Args:
        mark: a predicate on (path, leaf); or a tree of booleans, of which `params` may lack leaves (those that
            ``optax.masked`` takes out) and which may stop above the leaves; or None, for `default` everywhere.
        params: tree of arrays.
        what: name of the mark, for the error.
        default: the value where no mark is given.

    Raises:
        ValueError: a leaf of `params` has no mark; the message names it.
    """
    leaves, _ = tree_flatten_with_path(params)
    if mark is None:
        return [default] * len(leaves)
    if callable(mark):
        return [bool(mark(path, leaf)) for path, leaf in leaves]
    by_path = {path: bool(value) for path, value in tree_flatten_with_path(mark)[0]}
    return [_look_up(path, by_path, what) for path, _ in leaves]


def _look_up(path: tuple, by_path: dict[tuple, bool], what: str) -> bool:
    for length in range(len(path), -1, -1):
        if path[:length] in by_path:
            return by_path[path[:length]]
    raise ValueError(f"{what} has no mark for {leaf_name(path)}; it needs a boolean for every parameter")


def resolve_decay_mask(mask: Any | Callable[[Any], Any] | None, params: Any) -> list[bool]:
    """Which leaves are decayed: `mask` is what ``optax.add_decayed_weights`` takes, a tree or a function of params."""
    return resolve_mark(mask(params) if callable(mask) else mask, params, "weight_decay_mask", default=True)


def unflatten_like(params: Any, values: list[Any]) -> Any:
    """A tree of the structure of `params` with one value for each of its leaves."""
    return jax.tree.unflatten(jax.tree.structure(params), values)


def flatten_like(params: Any, tree: Any) -> list[Any]:
    """What stands in `tree` at each leaf of `params`: a leaf, a subtree, or None."""
    structure: Any = jax.tree.structure(params)
    return structure.flatten_up_to(tree)
