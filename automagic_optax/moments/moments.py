"""All 8-bit states of a wrapped transformation, read and written one after another."""

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
"""Slots below are those of section 3; each state draws the bits of a slot of its own."""


class Moments:
    """The states of one update, by their positions.

    Attributes:
        stored: what each state is stored as; new ones take the place of old ones.
    """

    def __init__(self, stored: Sequence[QuantizedMoment], writer: Writer) -> None:
        """Takes the states as they were stored by the last update, and how they are written."""
        self.stored = list(stored)
        self._writer = writer
        self._values: dict[int, jax.Array] = {}
        self._last: jax.Array | None = None

    def shapes(self) -> list[Any]:
        """Shape and dtype of each state's values."""
        return [jax.eval_shape(QuantizedMoment.read, moment) for moment in self.stored]

    def read(self, position: int) -> jax.Array:
        """The state's values, which the compiler cannot compute before the state last written is stored."""
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
        """The codes as they are, once `last` is there."""
        if not isinstance(last, jax.core.Tracer):
            return codes
        if jax.default_backend() != "cpu":
            return jax.lax.optimization_barrier((codes, last))[0]
        # On a CPU barriers are dropped before the order is chosen.  The step is never negative, which the compiler
        # cannot know: so this is always 0, but only the last codes tell.
        if has_explicit_axes(codes) or has_explicit_axes(last):
            types: Any = jax.typeof(codes).sharding
            return untyped(_later, types)(codes, last, self._writer.step)
        return _later(codes, last, self._writer.step)


def _later(codes: jax.Array, last: jax.Array, step: jax.Array) -> jax.Array:
    nothing = jnp.minimum(step, 0).astype(jnp.uint8) & last.reshape(-1)[0]
    return codes ^ nothing
