"""Reads and writes the 8-bit states of a wrapped transformation, one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core.arrays.evenly import evenly
from automagic_optax.arrays.batches import SMALLEST_BATCH, stack, unstack
from automagic_optax.arrays.in_chunks import CHUNK, after, chunk_count, in_chunks, runs_in_chunks
from automagic_optax.codec.random_bits import Chunk
from automagic_optax.codec.stored import Writer
from automagic_optax.moments.quantized_moment import QuantizedMoment, write_moment
from automagic_optax.moments.units import Unit, evaluated
from automagic_optax.sharding.explicit_mesh import untyped
from automagic_optax.sharding.placement import devices_of, has_explicit_axes

_LARGEST_BATCH = 2**20
"""In elements: what is stacked takes 14 bytes for each of them, for Adam."""
_LARGEST_ARRAY = 2**16
"""In elements.  Larger arrays are in no batch."""
_FIRST_SLOT = 5
"""Lower slots belong to other states (`docs/algorithm.md`, section 3.7).  Each state has a slot of its own."""


class Moments:
    """The states of one update, by their positions.

    Attributes:
        stored: the stored states; `write` replaces them.
    """

    def __init__(self, stored: Sequence[QuantizedMoment], writer: Writer) -> None:
        self.stored = list(stored)
        self._writer = writer
        self._values: dict[int, jax.Array] = {}
        self._last: jax.Array | None = None

    def shapes(self) -> list[Any]:
        """Shape and dtype of each state's values."""
        return [jax.eval_shape(QuantizedMoment.read, moment) for moment in self.stored]

    def read(self, position: int) -> jax.Array:
        """The state's values.  The compiler must compute them after the state that was written last."""
        moment = self.stored[position]
        if self._last is not None:
            moment = dataclasses.replace(moment, codes=self._after(moment.codes, self._last))
        self._values[position] = moment.read()
        return self._values[position]

    def write(self, position: int, value: jax.Array) -> None:
        """Stores the state's new values."""
        old = self.stored[position]
        new = write_moment(value, old, self._values.pop(position), self._writer, _FIRST_SLOT + position)
        self.stored[position] = new
        self._last = new.codes

    def batches(self, units: list[Unit], form: Any) -> list[list[Unit]]:
        """Large arrays on a CPU alone, for they are cut into chunks; small ones in batches (section 8)."""
        first = [self.stored[i] for i in units[0].states]
        codes = first[0].codes
        if any(devices_of(self.stored[i].codes) > 1 for unit in units for i in unit.states):
            return []
        seen: list[Any] = [v.aval for unit in units for v in (unit.target, *unit.read)]
        if any(aval.sharding.mesh.explicit_axes for aval in seen):  # a reshape may lose what a type says
            return []
        if any(x.size % (x.block_size or 1) or x.block_size is None for x in first):
            return []
        by_kind: dict[Any, list[Unit]] = {}
        for unit in units:
            kinds = [(x.signed, x.block_size, x.dtype) for x in (self.stored[i] for i in unit.states)]
            by_kind.setdefault(tuple(kinds), []).append(unit)
        several = max(_LARGEST_BATCH // codes.size, 1) if codes.size < _LARGEST_ARRAY else 1
        found = [batch for same in by_kind.values() for batch in evenly(same, several)]
        alone = runs_in_chunks(codes) and codes.size > CHUNK
        return [batch for batch in found if len(batch) >= SMALLEST_BATCH or alone]

    def together(self, units: list[Unit], inputs: list[list[Any]]) -> list[jax.Array]:
        """Computes units of one form, stores their states, and returns their updates."""
        like = [self.stored[i] for i in units[0].states]
        block = like[0].block_size
        assert block is not None
        shape, size = units[0].shape, like[0].size
        flat = (size // block, block)

        def as_blocks(x: jax.Array) -> jax.Array:
            return x.reshape(flat) if x.shape == shape else x

        moments = [
            [
                dataclasses.replace(x, codes=x.codes.reshape(flat), absmax=x.absmax.reshape(-1, 1))
                for x in (self.stored[i] for i in unit.states)
            ]
            for unit in units
        ]
        given = [[as_blocks(x) for x in row] for row in inputs]
        slots = np.array([[_FIRST_SLOT + i for i in unit.states] for unit in units], np.uint32)
        if len(units) == 1:
            results = self._alone(units[0], moments[0], given[0], flat)
        else:
            results = self._batch(units, moments, given, slots, flat)
        updates = []
        for unit, (update, new) in zip(units, results, strict=True):
            updates.append(update.reshape(shape))
            for i, moment in zip(unit.states, new, strict=True):
                old = self.stored[i]
                self.stored[i] = dataclasses.replace(
                    old, codes=moment.codes.reshape(old.codes.shape), absmax=moment.absmax.reshape(old.absmax.shape)
                )
        return updates

    def _alone(self, unit: Unit, moments: list[QuantizedMoment], given: list[Any], flat: tuple[int, int]) -> Any:
        count = chunk_count(*flat)
        whole = [i for i, x in enumerate(given) if x.shape != flat]
        cut = {i: x for i, x in enumerate(given) if x.shape == flat}

        def one(index: Any, chunk: Any) -> Any:
            moments, cut = chunk
            given_here = [given[i] if i in whole else cut[i] for i in range(len(given))]
            rows = flat[0] // count
            writer = self._writer._replace(chunk=Chunk(index * (rows * flat[1]), flat[0] * flat[1]))
            slots = [_FIRST_SLOT + i for i in unit.states]
            return _step(unit, moments, given_here, slots, writer, (rows, flat[1])), ()

        if count == 1:
            return [one(jnp.int32(0), (moments, cut))[0]]
        place = next((i for i, x in cut.items() if x.dtype == unit.dtype), None)
        if place is None:
            update = jnp.zeros(flat, unit.dtype)
        else:  # in the place of an input, which is the gradient in most optimizers; what is used later is copied
            if self._last is not None:
                cut[place] = after(jnp.minimum(self._writer.step, 0) * self._last.reshape(-1)[0], cut[place])
            update = cut[place]
        update, new = in_chunks(one, count, (moments, cut), (update, moments))[0]
        self._last = new[0].codes
        return [(update, new)]

    def _batch(
        self, units: list[Unit], moments: list[Any], given: list[Any], slots: np.ndarray, flat: tuple[int, int]
    ) -> Any:
        shared = [all(row[i] is given[0][i] for row in given) and given[0][i].ndim == 0 for i in range(len(given[0]))]
        stacked = [None if same else stack([row[i] for row in given]) for i, same in enumerate(shared)]

        def one(moments: Any, own: Any, slots: Any) -> Any:
            here = [given[0][i] if same else x for i, (same, x) in enumerate(zip(shared, own, strict=True))]
            return _step(units[0], moments, here, list(slots), self._writer, flat)

        operands = (stack(moments), stacked, jnp.asarray(slots))
        some = jax.vmap(one)
        count = chunk_count(len(units), flat[0] * flat[1]) if runs_in_chunks(moments[0][0].codes) else 1
        if count == 1:
            update, new = some(*operands)
        else:
            update = jnp.zeros((len(units), *flat), units[0].dtype)
            into = (update, operands[0])
            (update, new), _ = in_chunks(lambda _, chunk: (some(*chunk), ()), count, operands, into)
        return unstack((update, new), len(units))

    def _after(self, codes: jax.Array, last: jax.Array) -> jax.Array:
        """The codes, unchanged, after `last` was computed.  This saves memory: see `in_turn`."""
        # A type cannot come from the other's mesh, as where only gradients are on the mesh of ``jax.set_mesh``.
        if not isinstance(last, jax.core.Tracer) or has_explicit_axes(codes) != has_explicit_axes(last):
            return codes
        if jax.default_backend() != "cpu":
            codes, _ = jax.lax.optimization_barrier((codes, last))
            return codes
        later = _later
        if has_explicit_axes(codes):
            later = untyped(_later, jax.typeof(codes).sharding)
        return later(codes, last, self._writer.step)


def _step(
    unit: Unit,
    moments: list[QuantizedMoment],
    given: list[Any],
    slots: Sequence[Any],
    writer: Writer,
    shape: tuple[int, int],
) -> tuple[jax.Array, list[QuantizedMoment]]:
    """A unit on one array, or on a chunk of it, as blocks: its update and its states."""
    values: dict[Any, Any] = dict(zip(unit.inputs, given, strict=True))
    read = [moment.read() for moment in moments]
    values |= zip(unit.read, read, strict=True)
    evaluated(unit.equations, values, shape)
    written = [
        write_moment(values[new], moment, old, writer, slot)
        for new, moment, old, slot in zip(unit.outputs, moments, read, slots, strict=True)
    ]
    return values[unit.target], written


def _later(codes: jax.Array, last: jax.Array, step: jax.Array) -> jax.Array:
    # On a CPU barriers are dropped before the order is chosen.  `nothing` is 0, since the step is never negative, but
    # the compiler cannot know that and must compute `last` first.
    nothing = jnp.minimum(step, 0).astype(jnp.uint8) & last.reshape(-1)[0]
    return codes ^ nothing
