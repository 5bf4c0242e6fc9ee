"""Finds the trees inside an optimizer state that mirror the parameters.

A state like Adam's `mu` is a tree in the structure of the parameters.  It is found by this structure and not by the
shapes of its arrays, since other arrays may have a parameter's shape by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.tree_util import DictKey, GetAttrKey, tree_flatten_with_path

from automagic_optax.arrays.containers import is_container, pure
from automagic_optax.arrays.leaves import Path

IsLeaf = Callable[[Any], bool]


class Place(NamedTuple):
    """An array of the state, and the parameter at the same position of the parameters' tree.

    Attributes:
        path: the array's keys in the state; the last of them are the parameter's keys.
        owner: class of the named tuple or dictionary that holds the tree; None where there is none.
        field: the tree's name there, such as `nu`; "" where there is none.
        array: the array itself, without its container.
        parameter: the parameter.
        parameter_path: the parameter's keys.
    """

    path: Path
    owner: type | None
    field: str
    array: Any
    parameter: Any
    parameter_path: Path


def parameter_places(
    params: Any,
    state: Any,
    init: Callable[[Any], Any] | None = None,
    is_leaf: IsLeaf = lambda x: False,
) -> list[Place]:
    """All arrays of a state that are in trees in the structure of the parameters.  Shapes are not compared.

    Such a tree may lack parameters: ``optax.masked`` puts a `MaskedNode` in place of an array or a whole subtree, and
    None counts as one too.  Containers are replaced by what they hold.

    Args:
        params: the parameters.
        state: the state of a transformation.
        init: the transformation's `init`.  If `params` is a single array, it has no structure to look for, and tracing
            `init` shows where its states are.  Without `init`, or where that fails, all arrays of its shape are taken.
        is_leaf: what in the state counts as one array.

    Returns:
        The places in the order of the state's leaves.
    """

    def stops(x: Any) -> bool:
        return is_leaf(x) or is_container(x)

    places = list(_search(params, state, (), (None, ""), stops))
    if _children(params, stops) is not None:
        return places
    paths = None if init is None else _paths_of_bare(init, params)
    if paths is None:
        return [place for place in places if getattr(place.array, "shape", None) == np.shape(params)]
    return [place for place in places if place.path in paths]


def _search(params: Any, node: Any, path: Path, name: tuple[type | None, str], stops: IsLeaf) -> Iterator[Place]:
    """All places in a node of the state; `name` is the node's owner and field."""
    matched = _match(params, node, (), stops)
    if matched:
        for parameter_path, parameter, array in matched:
            yield Place((*path, *parameter_path), *name, array, parameter, parameter_path)
        return
    for key, child in _children(node, stops) or []:
        below = name
        if isinstance(key, GetAttrKey):
            below = (type(node), key.name)
        elif isinstance(key, DictKey):
            below = (type(node), str(key.key))
        yield from _search(params, child, (*path, key), below, stops)


def _match(params: Any, node: Any, path: Path, stops: IsLeaf) -> list[tuple[Path, Any, Any]] | None:
    """(path, parameter, array) for each array of a node in the structure of `params`; None if it has another."""
    if node is None or isinstance(node, optax.MaskedNode):
        return []
    ours, theirs = _children(params, stops), _children(node, stops)
    if ours is None or theirs is None:
        return [(path, pure(params), pure(node))] if ours is theirs else None
    if _structure(params, stops) != _structure(node, stops):
        return None
    found: list[tuple[Path, Any, Any]] = []
    for (key, below), (_, child) in zip(ours, theirs, strict=True):
        inside = _match(below, child, (*path, key), stops)
        if inside is None:
            return None
        found += inside
    return found


def _children(node: Any, stops: IsLeaf) -> list[tuple[Any, Any]] | None:
    """(key, child) of a node's own children; None of a leaf."""
    pairs, structure = tree_flatten_with_path(node, is_leaf=lambda x: x is not node or stops(x))
    return None if jax.tree_util.treedef_is_leaf(structure) else [(path[0], child) for path, child in pairs]


def _structure(node: Any, stops: IsLeaf) -> Any:
    """A node's own type, keys and static fields, without the structure of its children."""
    return jax.tree.structure(node, is_leaf=lambda x: x is not node or stops(x))


@jax.tree_util.register_pytree_with_keys_class
class _Known:
    """A node around one array, so that it can be found again in the state that `init` makes."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], None]:
        return ((GetAttrKey("array"), self.array),), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: Any) -> _Known:
        del aux
        return cls(*children)


def _paths_of_bare(init: Callable[[Any], Any], array: Any) -> set[Path] | None:
    """The paths of the states of a single array; None if `init` does not accept a tree in its place."""
    try:
        state = jax.eval_shape(init, _Known(array))
    except Exception:  # whatever a transformation of bare arrays raises when it is shown a tree
        return None
    found, _ = tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, _Known))
    return {path for path, x in found if isinstance(x, _Known)}
