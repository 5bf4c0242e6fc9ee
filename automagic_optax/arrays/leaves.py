"""Lists the leaves of a parameter tree, with the same paths in `init` and in `update`.

A container around a parameter (`containers`) is a node with one child.  The paths leave that child's key out, so that a
parameter has one path and one name whether or not something is around it.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from jax.tree_util import keystr, tree_flatten_with_path

from automagic_optax.arrays.containers import content, is_container

Path = tuple[Any, ...]


class Leaf(NamedTuple):
    """A leaf of a tree.

    Attributes:
        path: its keys, without those of containers.
        value: the leaf itself, in a tree of parameters an array.
        container: the class of the outermost container that holds it; None outside of one.
    """

    path: Path
    value: Any
    container: type | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape; () for a Python number."""
        return tuple(getattr(self.value, "shape", ()))

    @property
    def names(self) -> list[str]:
        """The names along the path, outermost first.  A dotted key (``layer.lora_A.weight``) is several names."""
        return [name for key in self.path for name in re.split(r"[./]", keystr((key,), simple=True))]


def leaves_of(tree: Any) -> list[Leaf]:
    """All leaves, in the order of ``jax.tree.leaves``."""
    found: list[Leaf] = []
    for path, node in tree_flatten_with_path(tree, is_leaf=is_container)[0]:
        if is_container(node):
            # It may hold no leaf (optax.masked empties it), one, or several.
            found += [Leaf((*path, *below.path), below.value, type(node)) for below in leaves_of(content(node))]
        else:
            found.append(Leaf(path, node, None))
    return found


def leaf_name(path: Path) -> str:
    """A leaf's path as a person would write it: ``layer.kernel``."""
    return keystr(path, simple=True, separator=".") or "the parameter"
