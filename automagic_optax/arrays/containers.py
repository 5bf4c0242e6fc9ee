"""Sees through containers: whatever a library wraps around a parameter to say more about it.

Known are ``nnx.Variable``, flax's ``AxisMetadata`` (the boxes of ``nn.with_partitioning`` and their like) and
``haliax.NamedArray``.  What a container says of its parameter, such as how it is split, holds of every array of the
same shape, and of no other.  So a state of the parameter's shape is put into such a container, and so are codes, inside
their `QuantizedArray`.  All other states (absmax, statistics, packed signs, scalars) stand bare.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from automagic_optax.codec.quantized_array import QuantizedArray
from automagic_optax.codec.stored import RowColumn


def known_class(module: str, name: str) -> type | None:
    """A class of another library; None if nobody imported its module, since then no tree holds one."""
    found: type | None = getattr(sys.modules.get(module), name, None)
    return found


def is_nnx(x: Any, name: str) -> bool:
    """Whether something is an instance of a class of ``flax.nnx``."""
    found = known_class("flax.nnx", name)
    return found is not None and isinstance(x, found)


def is_stored(x: Any) -> bool:
    """Whether x holds the state of one array.  None, and a container that a mask has emptied, hold none."""
    return isinstance(x, (QuantizedArray, RowColumn)) or (is_container(x) and bool(jax.tree.leaves(x)))


def is_variable(x: Any) -> bool:
    """Whether something is an ``nnx.Variable``."""
    return is_nnx(x, "Variable")


def is_container(x: Any) -> bool:
    """Whether something is a container around one parameter."""
    box = known_class("flax.core.meta", "AxisMetadata")
    return is_variable(x) or (box is not None and isinstance(x, box)) or _is_named_array(x)


def _is_named_array(x: Any) -> bool:
    """Whether something is a ``haliax.NamedArray``, by its protocol: a node around `array`, with `axes` beside it."""
    if isinstance(x, jax.Array) or not (hasattr(x, "array") and hasattr(x, "axes")):
        return False
    children = jax.tree.leaves(x, is_leaf=lambda y: y is not x)
    return len(children) == 1 and children[0] is x.array


def content(container: Any) -> Any:
    """What a container holds: an array, another container, or a tree, which may be empty."""
    if is_variable(container):
        value = container.get_raw_value()  # `get_value` goes through the Variable's hooks
        return value[...] if isinstance(value, jax.Ref) else value
    # A box's `unbox` would also constrain how the array is split.
    (child,) = jax.tree.leaves(container, is_leaf=lambda y: y is not container)
    return child


def refilled(container: Any, value: Any) -> Any:
    """The same container around another value."""
    if is_variable(container):
        return container.replace(value)
    return jax.tree.unflatten(jax.tree.structure(container, is_leaf=lambda y: y is not container), [value])


def pure(tree: Any) -> Any:
    """The tree with every container replaced by what it holds."""
    return jax.tree.map(lambda x: pure(content(x)) if is_container(x) else x, tree, is_leaf=is_container)


def flatten_like(params: Any, tree: Any) -> list[Any]:
    """For each leaf of `params`, the part of `tree` at its position: a leaf, a subtree, or None."""
    structure: Any = jax.tree.structure(pure(params))
    found: list[Any] = structure.flatten_up_to(pure(tree))
    return found


def unflatten_like(params: Any, values: Sequence[Any]) -> Any:
    """A tree in the structure of `params` with one value for each of its leaves, in containers where they fit."""
    rest = iter(values)
    tree = _filled(params, (), rest)
    assert next(rest, rest) is rest, "one value for each leaf"
    return tree


def _filled(tree: Any, around: tuple[Any, ...], rest: Iterator[Any]) -> Any:
    nodes, structure = jax.tree.flatten(tree, is_leaf=is_container)

    def one(node: Any) -> Any:
        if not is_container(node):
            return _held(next(rest), node, around)
        inside = content(node)
        leaves = jax.tree.leaves(inside)
        values = [next(rest) for _ in leaves]
        if not around and all(_fits(value, leaf) for value, leaf in zip(values, leaves, strict=True)):
            return refilled(node, unflatten_like(inside, values))  # also a container that optax.masked emptied
        return _filled(inside, (*around, node), iter(values))

    return jax.tree.unflatten(structure, [one(node) for node in nodes])


def _fits(value: Any, parameter: Any) -> bool:
    """Whether what a container says of the parameter holds for the value."""
    return not isinstance(value, QuantizedArray) and getattr(value, "shape", None) == parameter.shape


def _held(value: Any, parameter: Any, around: tuple[Any, ...]) -> Any:
    """The value, or its codes, in the containers around its parameter, if it fits."""
    if isinstance(value, QuantizedArray):
        return dataclasses.replace(value, codes=_held(value.codes, parameter, around))
    if around and _fits(value, parameter):
        for container in reversed(around):
            value = refilled(container, value)
    return value


def held_like(old: Any, new: Any) -> Any:
    """A tree with containers exactly where an older form of it has them.

    An update must not change the structure of a state, whatever `params` were in when it was called:
    ``nnx.Optimizer`` shows Variables to `init` and bare arrays to `update`, and a file may hold bare arrays.
    """
    has_any = any(map(is_container, jax.tree.leaves(old, is_leaf=is_container)))
    return _held_below(old, pure(new)) if has_any else pure(new)


def _held_below(old: Any, new: Any) -> Any:
    """`held_like` for a bare `new`.  Where the structures differ, `new` stays as it is."""
    if is_container(old):
        return refilled(old, _held_below(content(old), new))
    structure: Any
    ours, structure = jax.tree.flatten(old, is_leaf=lambda x: x is not old)
    theirs, other = jax.tree.flatten(new, is_leaf=lambda x: x is not new)
    if structure != other or jax.tree_util.treedef_is_leaf(structure):
        return new
    return jax.tree.unflatten(structure, [_held_below(a, b) for a, b in zip(ours, theirs, strict=True)])
