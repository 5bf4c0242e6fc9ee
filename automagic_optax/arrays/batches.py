"""Stacks arrays of one kind into batches, so that a thousand adapters are a few operations.

`docs/algorithm.md`, section 8.  One by one, a thousand arrays are a thousand FFTs and minutes of compilation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from automagic_core.arrays.evenly import evenly
from automagic_optax.arrays.alike import alike
from automagic_optax.arrays.containers import flatten_like, unflatten_like
from automagic_optax.sharding.placement import devices_of

SMALLEST_BATCH = 4
"""In arrays.  On a CPU fewer arrays gain nothing from a batch, and it takes longer to compile."""
LARGEST_ARRAY = 2**18
"""In elements.  A batch is a copy of its arrays; for larger arrays the copy costs more than the calls it saves."""
LARGEST_BATCH = 2**23
"""In elements: 32 MB of float32 values."""
_TOGETHER = 10
"""How many arrays one compiled function takes out of a batch."""


@dataclasses.dataclass(frozen=True)
class Batched:
    """The leaves of a tree in batches.  The stages of a chain pass their updates on as this.

    Attributes:
        arrays: one for each batch: its arrays stacked along a leading axis, a list of them that nobody has stacked yet,
            or a single array as it is.
        others: one for each leaf of the flat tree: the leaf where it is in no batch, else None.
        positions: for each batch, the positions of its arrays in the flat tree.
        kinds: for each batch, the kind that its arrays share.
        apart: one value for each leaf of the flat tree; arrays with different values are never in one batch.
    """

    arrays: list[Any]
    others: list[Any]
    positions: tuple[tuple[int, ...], ...]
    kinds: tuple[Any, ...]
    apart: tuple[Hashable, ...]

    def replace(self, arrays: Sequence[Any], others: Sequence[Any] | None = None) -> Batched:
        """The same batches with other arrays, and with other leaves in no batch."""
        return dataclasses.replace(self, arrays=list(arrays), others=self.others if others is None else list(others))

    def taken_apart(self, leaves: Sequence[Any]) -> Batched:
        """One leaf for each of the flat tree, none of them in a batch."""
        return dataclasses.replace(self, arrays=[], positions=(), kinds=(), others=list(leaves))

    def flat(self) -> list[Any]:
        """The leaves one by one, in order."""
        return self.spread(self.arrays, self.others)

    def spread(self, results: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """One result for each leaf, from one for each batch (stacked like its arrays) and from `others`."""
        found = list(others)
        for positions, result in zip(self.positions, results, strict=True):
            several = [result] if len(positions) == 1 else result
            several = several if isinstance(several, list) else unstack(result, len(positions))
            for position, one in zip(positions, several, strict=True):
                found[position] = one
        return found

    def map(
        self, function: Callable[..., Any], *columns: Sequence[Any], batch: Callable[..., Any] | None = None
    ) -> list[Any]:
        """`function(array, *values)` on every array, one call for each batch.

        Args:
            function: of one array and its entry of each column.
            columns: sequences with one tree for each leaf.
            batch: the same on several arrays, with a leading axis on all; by default it is made of `function`.

        Returns:
            One result for each batch, stacked like its arrays.
        """
        pairs = zip(self.arrays, self.positions, strict=True)
        return [_apply(function, array, positions, columns, batch) for array, positions in pairs]

    def map_in_turn(self, function: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
        """`map`, but each batch waits for the one before.

        Otherwise XLA may start all batches at once and hold the temporaries of all.  On a CPU they could also block
        each other for ever: an FFT occupies a thread of XLA's pool while it waits for other threads of the pool.

        Args:
            function: as in `map`; it returns a tuple whose last entry is never negative.
            columns: as in `map`.
        """
        results: list[Any] = []
        last: Any = None

        def after_the_last(array: jax.Array, *values: Any) -> Any:
            return function(array if last is None else waiting(last, array), *values)

        for array, positions in zip(self.arrays, self.positions, strict=True):
            results.append(_apply(after_the_last, array, positions, columns))
            end = jnp.sum(results[-1][-1])
            if isinstance(end, jax.core.Tracer):
                last = end if last is None else last + end
        return results


def waiting(last: jax.Array, x: jax.Array) -> jax.Array:
    """x, as a new array that waits for `last`: it is never negative, but the compiler cannot know that."""
    return jnp.where(last < 0, jnp.zeros_like(x), x)


def _apply(
    function: Callable[..., Any],
    array: jax.Array,
    positions: Sequence[int],
    columns: Sequence[Any],
    batch: Callable[..., Any] | None = None,
) -> Any:
    """Calls the function on one batch."""
    array = stack(array) if isinstance(array, list) else array
    entries = [tuple(column[position] for column in columns) for position in positions]
    return (
        function(array, *entries[0]) if len(positions) == 1 else (batch or jax.vmap(function))(array, *stack(entries))
    )


def in_batches(leaves: Sequence[Any], kinds: Sequence[Hashable], apart: Sequence[Hashable] | None = None) -> Batched:
    """Stacks arrays of equal shape, dtype and kind.  None and arrays without elements are in no batch.

    Args:
        leaves: arrays, or None.
        kinds: one for each leaf: what the arrays of a batch must share besides shape and dtype.
        apart: one for each leaf, which they must share too: how it is split (`alike`).  `Batched` remembers it.
    """
    apart = [None] * len(leaves) if apart is None else apart
    by_key: dict[Hashable, list[int]] = {}
    for position, (leaf, kind) in enumerate(zip(leaves, kinds, strict=True)):
        if leaf is not None and leaf.size > 0:
            by_key.setdefault((leaf.shape, leaf.dtype, kind, apart[position]), []).append(position)

    def most(leaf: jax.Array) -> int:
        return max(LARGEST_BATCH // leaf.size, 1) if leaf.size <= LARGEST_ARRAY else 1

    found = sorted(itertools.chain.from_iterable(evenly(same, most(leaves[same[0]])) for same in by_key.values()))
    parts = ([batch] if len(batch) >= SMALLEST_BATCH else [[one] for one in batch] for batch in found)
    positions = list(itertools.chain.from_iterable(parts))
    inside = set(itertools.chain.from_iterable(positions))
    return Batched(
        arrays=[leaves[batch[0]] if len(batch) == 1 else [leaves[i] for i in batch] for batch in positions],
        others=[None if position in inside else leaf for position, leaf in enumerate(leaves)],
        positions=tuple(map(tuple, positions)),
        kinds=tuple(kinds[batch[0]] for batch in positions),
        apart=tuple(apart),
    )


def enter(updates: Any, like: Any, kinds: Sequence[Hashable] | None = None) -> tuple[Batched, Callable[[Batched], Any]]:
    """Puts updates in batches, and returns with them the function that undoes it.

    Args:
        updates: a tree, or `Batched` from the stage before.  Its batches are kept if each has a single kind here too.
        like: a tree in the structure of the parameters.
        kinds: one for each leaf, as for `in_batches`; None where shape and dtype are enough.
    """
    if not isinstance(updates, Batched):
        flat = flatten_like(like, updates)
        batched = in_batches(flat, kinds or [()] * len(flat), alike(like, flat))
        return batched, lambda batched: unflatten_like(like, batched.flat())
    if kinds is None:
        return updates, lambda batched: batched
    if any(len({kinds[position] for position in positions}) > 1 for positions in updates.positions):
        return in_batches(updates.flat(), kinds, updates.apart), lambda batched: batched
    mine = tuple(kinds[positions[0]] for positions in updates.positions)
    return dataclasses.replace(updates, kinds=mine), lambda batched: batched


def stack(trees: Sequence[Any]) -> Any:
    """Stacks trees of one structure into one tree, whose arrays have a leading axis."""
    return jax.tree.map(_stacked, *trees)


def _stacked(*leaves: jax.Array) -> jax.Array:
    first = leaves[0]
    if first.ndim == 0 or not isinstance(first, jax.core.Tracer) or devices_of(first) > 1:
        return jnp.stack(leaves)
    # `jnp.stack` makes one more operation for each array: for a thousand arrays that takes seconds to compile.
    return lax.concatenate(leaves, 0).reshape(len(leaves), *first.shape)


def unstack(tree: Any, count: int) -> list[Any]:
    """Undoes `stack`.

    Hiding the indices from the compiler saves compilation: it makes one kernel for all slices, where each constant
    index would be a kernel of its own, at 10 ms each.
    """
    leaves, structure = jax.tree.flatten(tree)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return [jax.tree.unflatten(structure, [leaf[i] for leaf in leaves]) for i in range(count)]
    indices = [lax.optimization_barrier(np.array([i, 0], np.uint32))[0] for i in range(count)]
    found = itertools.chain.from_iterable(
        _at(leaves, indices[start : start + _TOGETHER]) for start in range(0, count, _TOGETHER)
    )
    return [jax.tree.unflatten(structure, slices) for slices in found]


def as_one_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which stays one call in the compiled program: on a CPU, and on arguments on a single device.

    What a call computes starts when all its arguments are there.  XLA's CPU backend starts everything else as early as
    it can, and so stacks all batches before it steps the first.  Other backends and the partitioner need calls inlined.
    """

    def call(*arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        if not traced or jax.default_backend() != "cpu" or any(devices_of(leaf) > 1 for leaf in leaves):
            return function(*arguments)
        with set_xla_metadata(inlineable="false"):
            return jax.jit(inside)(*arguments)

    def inside(*arguments: Any) -> Any:
        with set_xla_metadata(inlineable="true"):
            return function(*arguments)

    return call


@jax.jit
def _at(leaves: list[jax.Array], indices: list[jax.Array]) -> list[list[jax.Array]]:
    def one(x: jax.Array, index: jax.Array) -> jax.Array:
        start = [index] + [jnp.zeros([], index.dtype)] * (x.ndim - 1)
        return lax.dynamic_slice(x, start, (1, *x.shape[1:])).reshape(x.shape[1:])

    return [[one(leaf, index) for leaf in leaves] for index in indices]
