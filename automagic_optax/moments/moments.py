"""Reads and writes the 8-bit states of a wrapped transformation, one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from automagic_optax.codec.stored import Writer
from automagic_optax.moments.quantized_moment import QuantizedMoment, write_moment
from automagic_optax.sharding.explicit_mesh import untyped
from automagic_optax.sharding.placement import has_explicit_axes

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

    def _after(self, codes: jax.Array, last: jax.Array) -> jax.Array:
        """The codes, unchanged, after `last` was computed.  This saves memory: see `in_turn`."""
        if not isinstance(last, jax.core.Tracer):
            return codes
        if jax.default_backend() != "cpu":
            codes, _ = jax.lax.optimization_barrier((codes, last))
            return codes
        later = _later
        if has_explicit_axes(codes) or has_explicit_axes(last):
            later = untyped(_later, jax.typeof(codes).sharding)
        return later(codes, last, self._writer.step)


def _later(codes: jax.Array, last: jax.Array, step: jax.Array) -> jax.Array:
    # On a CPU barriers are dropped before the order is chosen.  `nothing` is 0, since the step is never negative, but
    # the compiler cannot know that and must compute `last` first.
    nothing = jnp.minimum(step, 0).astype(jnp.uint8) & last.reshape(-1)[0]
    return codes ^ nothing
