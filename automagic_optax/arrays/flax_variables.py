"""Sees through flax Variables inside parameter and state trees.

``nnx.Optimizer`` calls `init` with an ``nnx.State`` of Variables and `update` with the same State of bare arrays.  It
keeps every leaf of the state in a Variable.  So a `QuantizedArray` must hold Variables and not be held by one:
otherwise flax takes it apart in the first update, and the step compiles twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from automagic_optax.arrays.leaves import is_nnx, nnx_class
from automagic_optax.codec.quantized_array import QuantizedArray


def is_variable(x: Any) -> bool:
    """Whether something is an ``nnx.Variable``."""
    return is_nnx(x, "Variable")


def pure(tree: Any) -> Any:
    """The tree with every Variable replaced by its value."""
    if nnx_class("Variable") is None:
        return tree
    return jax.tree.map(lambda x: pure(x.get_value()) if is_variable(x) else x, tree, is_leaf=is_variable)


def flatten_like(params: Any, tree: Any) -> list[Any]:
    """For each leaf of `params`, the part of `tree` at its position: a leaf, a subtree, or None."""
    structure: Any = jax.tree.structure(pure(params))
    found: list[Any] = structure.flatten_up_to(pure(tree))
    return found


def unflatten_like(params: Any, values: Sequence[Any]) -> Any:
    """A tree in the structure of `params` with one value for each of its leaves.

    Where `params` holds a Variable, the result holds an array (or codes) of its shape in a Variable with the same
    metadata.  So a sharding by name also applies to the states that it fits.
    """
    nodes, structure = jax.tree.flatten(params, is_leaf=is_variable)
    placed = [_placed(node, value) if is_variable(node) else value for node, value in zip(nodes, values, strict=True)]
    return jax.tree.unflatten(structure, placed)


def _placed(variable: Any, value: Any) -> Any:
    shape = variable.get_value().shape
    if isinstance(value, QuantizedArray):
        return dataclasses.replace(value, codes=variable.replace(value.codes))
    return variable.replace(value) if isinstance(value, jax.Array) and value.shape == shape else value
