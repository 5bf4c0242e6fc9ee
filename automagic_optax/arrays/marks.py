"""Finds out which leaves are embeddings, adapters, or decayed (`docs/algorithm.md`, section 1.4)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import numpy as np

from automagic_optax.arrays.default_marks import default_marks
from automagic_optax.arrays.leaves import Path, leaf_name, leaves_of

Mark = Callable[[Path, Any], bool] | Any | None
"""A predicate on (path, leaf), a tree of booleans (or a prefix of one), or None for the default rule."""


def resolve_mark(mark: Mark, params: Any, what: str, default: bool = False) -> list[bool]:
    """One boolean for each leaf of `params`, in order.

    Args:
        mark: a predicate on (path, leaf); a tree of booleans, which may have extra leaves, and in which one boolean may
            stand for a whole subtree; or None: `default_marks` for ``"lora"`` and ``"embedding"``, else `default`.
        params: tree of arrays, which may be in containers.
        what: name of the mark, for the default rule and the error.
        default: the value of every leaf if `mark` is None and there is no rule.

    Raises:
        ValueError: a leaf of `params` has no mark, and the message names it; the mark is a scalar array of JAX.
    """
    leaves = leaves_of(params)
    check_not_called(mark, what)
    if mark is None and what in ("lora", "embedding"):
        return default_marks(params, what)
    if mark is None:
        return [default] * len(leaves)
    if is_function(mark):
        return [bool(mark(leaf.path, leaf.value)) for leaf in leaves]
    by_path = {leaf.path: bool(leaf.value) for leaf in leaves_of(mark)}
    return [_look_up(leaf.path, by_path, what) for leaf in leaves]


def check_not_called(mark: Mark, what: str, injected: bool = False) -> None:
    """Raises a ValueError if a mark may be what a function gave that ``optax.inject_hyperparams`` called with the step.

    As a prefix of the tree it would mark every leaf alike, without a word.

    Args:
        mark: a scalar of JAX is always refused, one boolean of Python or numpy only if `injected`.
        what: name of the mark.
        injected: whether other arguments look as if ``optax.inject_hyperparams`` gave them.
    """
    if (isinstance(mark, jax.Array) and mark.ndim == 0) or (injected and isinstance(mark, (bool, np.bool_))):
        raise ValueError(
            f"{what} is a single value: optax.inject_hyperparams calls a function as a schedule of the step; "
            f"give it static_args=({what!r},), or give a tree of booleans"
        )


def _look_up(path: Path, by_path: dict[Path, bool], what: str) -> bool:
    for length in range(len(path), -1, -1):
        if path[:length] in by_path:
            return by_path[path[:length]]
    raise ValueError(f"{what} has no mark for {leaf_name(path)}; it needs a boolean for every parameter")


def found_marks(params: Any, lora: Mark = None, embedding: Mark = None) -> dict[str, list[str]]:
    """The adapters and embeddings of a parameter tree, for a report.

    Args:
        params: tree of arrays.
        lora, embedding: as given to ``automagic_8bit``; None for the default rule.

    Returns:
        Dotted names of leaves in their order, under ``"lora"`` and ``"embedding"``.  Only arrays with two axes can be
        adapters, whatever a mark says.

    Raises:
        ValueError: a tree of booleans lacks a leaf; the message names it.

    Example:
        >>> found_marks(nnx.state(model, nnx.Param))["embedding"]
        ['embed.embedding']
    """
    leaves = leaves_of(params)
    adapters = resolve_mark(lora, params, "lora")
    embeddings = resolve_mark(embedding, params, "embedding")
    return {
        "lora": [leaf_name(x.path) for x, mark in zip(leaves, adapters, strict=True) if mark and len(x.shape) == 2],
        "embedding": [leaf_name(x.path) for x, mark in zip(leaves, embeddings, strict=True) if mark],
    }


def resolve_decay_mask(mask: Any | Callable[[Any], Any] | None, params: Any) -> list[bool]:
    """Which leaves are decayed.  `mask` is a tree or a function of params, as for ``optax.add_decayed_weights``."""
    return resolve_mark(mask(params) if is_function(mask) else mask, params, "weight_decay_mask", default=True)


def is_function(mark: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether a mark is to be called.  A tree of booleans may be callable too, as a module of Equinox is."""
    return callable(mark) and (isinstance(mark, functools.partial) or all(map(callable, jax.tree.leaves(mark))))
