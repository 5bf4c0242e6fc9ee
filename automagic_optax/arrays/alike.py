"""Tells which arrays are split over devices alike, so that they may be stacked (`docs/algorithm.md`, section 8)."""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import NamedSharding

from automagic_optax.arrays.leaves import Leaf, Path, leaves_of
from automagic_optax.sharding.placement import devices_of, known_sharding

_KNOWN: contextvars.ContextVar[Mapping[Path, NamedSharding] | None] = contextvars.ContextVar("_KNOWN", default=None)


@contextlib.contextmanager
def remembered_shardings(tree: Any) -> Iterator[None]:
    """Tells `alike` how the tree's leaves are split, for code inside of which their types no longer say so."""
    found = [(leaf.path, known_sharding(leaf.value)) for leaf in leaves_of(tree)]
    token = _KNOWN.set({path: sharding for path, sharding in found if sharding is not None})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def alike(like: Any, arrays: Sequence[Any]) -> list[Hashable]:
    """One value for each array, equal only for arrays that can be stacked without moving them between devices.

    It is the sharding where that is known.  Inside ``jax.jit`` over Auto axes it is unknown.  There it is the path
    without the numbers above its last name, since the same array of another layer is usually split in the same way.

    Args:
        like: a tree that gives the paths.
        arrays: an array or None for each leaf of `like`.
    """
    remembered = _KNOWN.get() or {}

    def one(leaf: Leaf, x: Any) -> Hashable:
        if x is None or devices_of(x) == 1:
            return None
        *above, last = leaf.names or [""]
        return known_sharding(x) or remembered.get(leaf.path) or (*(re.sub(r"\d+", "", name) for name in above), last)

    return [one(leaf, x) for leaf, x in zip(leaves_of(like), arrays, strict=True)]
