"""Arrays of one form as one batch: adapters are hundreds of arrays of a few shapes.

One by one, a thousand arrays are a thousand FFTs, and a program that takes minutes to compile.  As batches with a
leading axis they are as many operations as there are shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from automagic_optax.arrays.alike import alike
from automagic_optax.arrays.flax_variables import flatten_like, unflatten_like
from automagic_optax.sharding.placement import devices_of

SMALLEST_BATCH = 4
"""Arrays.  On a CPU fewer take as long together as one by one, and longer to compile."""
LARGEST_ARRAY = 2**18
"""Elements.  A batch is a copy of its arrays; for larger ones that costs more than the calls it saves."""
LARGEST_BATCH = 2**23
"""Elements: float32 values of 32 MB at a time."""
_TOGETHER = 10
"""Arrays that one function takes out of a batch."""


@dataclasses.dataclass(frozen=True)
class Batched:
    """The leaves of a tree in batches.  Inside one chain updates travel like this from stage to stage.

    Attributes:
        arrays: one for each batch: stacked along a leading axis, or as it is where a batch has a single array.
        others: at each position of the flat tree that is in no batch, what stands there; None at the others.
        positions: of each batch's arrays in the flat tree.
        forms: what the arrays of each batch have in common.
        apart: one value for each position of the flat tree; arrays of different values are never in one batch.
        places: by the length of a batch the numbers 0, 1, …, hidden from the compiler (see `unstack`), made once for
            all stages.
    """

    arrays: list[jax.Array]
    others: list[Any]
    positions: tuple[tuple[int, ...], ...]
    forms: tuple[Any, ...]
    apart: tuple[Hashable, ...]
    places: dict[int, list[jax.Array]] = dataclasses.field(default_factory=dict)

    def replace(self, arrays: Sequence[Any], others: Sequence[Any] | None = None) -> Batched:
        """The same with other arrays, and with other leaves besides them."""
        return dataclasses.replace(self, arrays=list(arrays), others=self.others if others is None else list(others))

    def flat(self) -> list[Any]:
        """The leaves one by one, in order."""
        return self.spread(self.arrays, self.others)

    def spread(self, results: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """One result for each position, from one for each batch (stacked like its arrays) and those in no batch."""
        found = list(others)
        for positions, result in zip(self.positions, results, strict=True):
            several = [result] if len(positions) == 1 else unstack(result, len(positions), self.places)
            for position, one in zip(positions, several, strict=True):
                found[position] = one
        return found

    def one_by_one(self) -> Iterator[Batched]:
        """Each batch by itself."""
        for positions, array, form in zip(self.positions, self.arrays, self.forms, strict=True):
            yield dataclasses.replace(self, arrays=[array], positions=(positions,), forms=(form,))

    def map(self, function: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
        """`function(array, *values)` on every array, one call for each batch.

        Args:
            function: of one array and its entry of each column; by keyword `form` it gets the form.
            columns: one tree for each position.

        Returns:
            One result for each batch, stacked like its arrays.
        """
        results = []
        for positions, array, form in zip(self.positions, self.arrays, self.forms, strict=True):
            entries = [tuple(column[position] for column in columns) for position in positions]
            of_form = functools.partial(function, form=form)
            if len(positions) == 1:
                results.append(of_form(array, *entries[0]))
            else:
                results.append(jax.vmap(of_form)(array, *stack(entries)))
        return results

    def map_in_turn(self, function: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
        """`map`, each batch after the one before.

        Left to itself XLA begins with all of them and holds what they need at one time.  And on a CPU an FFT may occupy
        a thread of XLA's pool while it waits for other threads of the pool: as many FFTs at a time as there are threads
        would wait for each other for ever.

        Args:
            function: as in `map`; its results are tuples, and what they end with is never negative.
            columns: one tree for each position.
        """
        results: list[Any] = []
        last: Any = None

        def after_the_last(array: jax.Array, *values: Any, form: Any) -> Any:
            # Never true, which the compiler cannot know: only a reason to wait.
            waiting = array if last is None else jnp.where(last < 0, jnp.zeros_like(array), array)
            return function(waiting, *values, form=form)

        for batch in self.one_by_one():
            results += batch.map(after_the_last, *columns)
            end = jnp.sum(results[-1][-1])
            if isinstance(end, jax.core.Tracer):
                last = end if last is None else last + end
        return results


def in_batches(leaves: Sequence[Any], forms: Sequence[Hashable], apart: Sequence[Hashable] | None = None) -> Batched:
    """Puts arrays of equal shape, dtype and form together; None and arrays without elements are in no batch.

    Args:
        leaves: arrays, or None.
        forms: one for each leaf, what must be equal besides.
        apart: one for each leaf, which must be equal too and stays with the arrays: where they are (`alike`).
    """
    apart = [None] * len(leaves) if apart is None else apart
    found: list[list[int]] = []
    last: dict[Hashable, list[int]] = {}
    for position, (leaf, form) in enumerate(zip(leaves, forms, strict=True)):
        if leaf is None or leaf.size == 0:
            continue
        key = (leaf.shape, leaf.dtype, form, apart[position])
        batch = last.get(key)
        if batch is None or leaf.size > LARGEST_ARRAY or (len(batch) + 1) * leaf.size > LARGEST_BATCH:
            batch = last[key] = []
            found.append(batch)
        batch.append(position)
    parts = ([batch] if len(batch) >= SMALLEST_BATCH else [[one] for one in batch] for batch in found)
    positions = list(itertools.chain.from_iterable(parts))
    inside = set(itertools.chain.from_iterable(positions))
    return Batched(
        arrays=[leaves[batch[0]] if len(batch) == 1 else stack([leaves[i] for i in batch]) for batch in positions],
        others=[None if position in inside else leaf for position, leaf in enumerate(leaves)],
        positions=tuple(map(tuple, positions)),
        forms=tuple(forms[batch[0]] for batch in positions),
        apart=tuple(apart),
    )


def enter(updates: Any, like: Any, forms: Sequence[Hashable] | None = None) -> tuple[Batched, Callable[[Batched], Any]]:
    """Updates in batches, and the way back to what they came as.

    Args:
        updates: a tree, or `Batched` from the stage before, which is used as it is where its batches have one form
            each here too.
        like: a tree of the structure of the parameters.
        forms: what the arrays of a batch must have in common besides shape and dtype, one for each leaf of the flat
            tree; None where any may be together.
    """
    if not isinstance(updates, Batched):
        flat = flatten_like(like, updates)
        batched = in_batches(flat, forms or [()] * len(flat), alike(like, flat))
        return batched, lambda batched: unflatten_like(like, batched.flat())
    if forms is None:
        return updates, lambda batched: batched
    if any(len({forms[position] for position in positions}) > 1 for positions in updates.positions):
        return in_batches(updates.flat(), forms, updates.apart), lambda batched: batched
    mine = tuple(forms[positions[0]] for positions in updates.positions)
    return dataclasses.replace(updates, forms=mine), lambda batched: batched


def stack(trees: Sequence[Any]) -> Any:
    """One tree of arrays with a leading axis from several of one structure."""
    return jax.tree.map(_stacked, *trees)


def _stacked(*leaves: jax.Array) -> jax.Array:
    first = leaves[0]
    if first.ndim == 0 or not isinstance(first, jax.core.Tracer) or devices_of(first) > 1:
        return jnp.stack(leaves)
    # One operation, where `jnp.stack` makes one more for each array, which for a thousand take seconds to compile.
    return lax.concatenate(leaves, 0).reshape(len(leaves), *first.shape)


def unstack(tree: Any, count: int, places: dict[int, list[jax.Array]]) -> list[Any]:
    """The several trees again.

    A slice at a known place is a kernel of its own for each place, and XLA takes some 10 ms for each.  With the place
    hidden from the compiler all of them are one kernel.
    """
    leaves, structure = jax.tree.flatten(tree)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return [jax.tree.unflatten(structure, [leaf[place] for leaf in leaves]) for place in range(count)]
    if count not in places:
        places[count] = [lax.optimization_barrier(np.array([place, 0], np.uint32))[0] for place in range(count)]
    found: list[list[jax.Array]] = []
    with _kept_apart(leaves):
        for start in range(0, count, _TOGETHER):
            found += _at(leaves, places[count][start : start + _TOGETHER])
    return [jax.tree.unflatten(structure, slices) for slices in found]


def _kept_apart(leaves: Sequence[jax.Array]) -> contextlib.AbstractContextManager[None]:
    """Calls made inside stay calls in the compiled program.

    On a CPU XLA compares each kernel of a function with every other one: where all 16 slices of 1,000 arrays are in one
    function, that is a quarter of the time it takes.  Other backends want them inlined, and so does the partitioner.
    """
    if jax.default_backend() != "cpu" or any(devices_of(leaf) > 1 for leaf in leaves):
        return contextlib.nullcontext()
    return set_xla_metadata(inlineable="false")


@jax.jit
def _at(leaves: list[jax.Array], places: list[jax.Array]) -> list[list[jax.Array]]:
    def one(x: jax.Array, place: jax.Array) -> jax.Array:
        start = [place] + [jnp.zeros([], place.dtype)] * (x.ndim - 1)
        return lax.dynamic_slice(x, start, (1, *x.shape[1:])).reshape(x.shape[1:])

    return [[one(leaf, place) for leaf in leaves] for place in places]
