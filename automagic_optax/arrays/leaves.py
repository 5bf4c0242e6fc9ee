"""Lists the leaves of a parameter tree, with the same paths in `init` and in `update`.

``nnx.Optimizer`` passes an ``nnx.State`` of Variables to `init` and the same State of bare arrays to `update`.  A
Variable is a node with one child, its ``.value``.  The paths leave that child's key out.
"""

from __future__ import annotations

import re
import sys
from typing import Any, NamedTuple

from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

Path = tuple[Any, ...]


class Leaf(NamedTuple):
    """A leaf of a tree.

    Attributes:
        path: its keys, without that of a Variable's value.
        value: the leaf itself, in a tree of parameters an array.
        variable: the class of the ``nnx.Variable`` that holds it; None outside of one.
    """

    path: Path
    value: Any
    variable: type | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape; () for a Python number."""
        return tuple(getattr(self.value, "shape", ()))

    @property
    def names(self) -> list[str]:
        """The names along the path, outermost first.  A dotted key (``layer.lora_A.weight``) is several names."""
        path = self.path
        if path and path[-1] == GetAttrKey("value"):  # linen.Partitioned holds a parameter in `value`
            path = path[:-1]
        return [name for key in path for name in re.split(r"[./]", keystr((key,), simple=True))]


def leaves_of(tree: Any) -> list[Leaf]:
    """All leaves, in the order of ``jax.tree.leaves``."""
    variable = nnx_class("Variable")
    if variable is None:
        return [Leaf(path, value, None) for path, value in tree_flatten_with_path(tree)[0]]
    found: list[Leaf] = []
    for path, node in tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, variable))[0]:
        if isinstance(node, variable):
            # A Variable may have no leaf (optax.masked empties it), one, or several (its value may be a tree).
            inside = tree_flatten_with_path(node)[0]
            found += [Leaf((*path, *below[1:]), value, type(node)) for below, value in inside]
        else:
            found.append(Leaf(path, node, None))
    return found


def leaf_name(path: Path) -> str:
    """A leaf's path as a person would write it: ``layer.kernel``."""
    return keystr(path, simple=True, separator=".") or "the parameter"


def nnx_class(name: str) -> type | None:
    """A class of ``flax.nnx``; None if nobody imported flax.nnx, since then no tree holds one."""
    found: type | None = getattr(sys.modules.get("flax.nnx"), name, None)
    return found


def is_nnx(x: Any, name: str) -> bool:
    """Whether something is an instance of a class of ``flax.nnx``."""
    found = nnx_class(name)
    return found is not None and isinstance(x, found)
