"""Reads states as float32 and stores them again, companded where they are never negative.

`docs/algorithm.md`, section 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from automagic_optax.codec.quantized_array import QuantizedArray, RoundingRule, exact_rule, quantized
from automagic_optax.codec.random_bits import Chunk, random_unit, walk_signs

Stored = jax.Array | QuantizedArray


class RowColumn(NamedTuple):
    """A factored state: the moving averages of an array's row means and column means, dimensions kept.

    A narrow array has the longer one of them in 8 bits, as its root, and may have the shorter one alone.
    """

    row: Stored | None
    column: Stored | None


StoredMoment = Stored | RowColumn


def tensors_of(moment: StoredMoment, name: str) -> dict[str, Stored]:
    """A moment's tensors by their flat names (section 6.1): itself, or its statistics."""
    if not isinstance(moment, RowColumn):
        return {name: moment}
    parts = {f"{name}_row": moment.row, f"{name}_col": moment.column}
    return {part: x for part, x in parts.items() if x is not None}


def moment_from(parts: Mapping[str, Stored], name: str) -> StoredMoment:
    """Undoes `tensors_of`."""
    return parts[name] if name in parts else RowColumn(parts.get(f"{name}_row"), parts.get(f"{name}_col"))


def read_signed(stored: Stored) -> jax.Array:
    """The float32 values of a signed state."""
    return stored.dequantize() if isinstance(stored, QuantizedArray) else stored


class Statistics(NamedTuple):
    """The float32 values of a `RowColumn`."""

    row: jax.Array | None
    column: jax.Array | None


def read_nonnegative(stored: StoredMoment) -> jax.Array | Statistics:
    """The float32 values of a non-negative state."""
    if isinstance(stored, RowColumn):
        return Statistics(*(None if x is None else read_root(x) for x in stored))
    return read_root(stored)


def read_root(stored: Stored) -> jax.Array:
    """As `read_nonnegative`, for one tensor."""
    return jnp.square(stored.dequantize()) if isinstance(stored, QuantizedArray) else stored


class Writer(NamedTuple):
    """Stores float32 values in the form of a state.

    Attributes:
        step: t, for the random bits.
        stochastic: round stochastically, else to nearest.
        rule: how a normalized value becomes a code.
        chunk: which chunk of an array its values are; None for whole arrays.
    """

    step: jax.Array
    stochastic: bool
    rule: RoundingRule = exact_rule
    chunk: Chunk | None = None

    def signs(self, shape: tuple[int, ...]) -> jax.Array:
        """The signs of the walk."""
        return walk_signs(shape, self.chunk)

    def signed(self, value: jax.Array, like: Stored, slot: int | jax.Array) -> Stored:
        """Stores a signed state in the form of `like`, with the random bits of `slot`."""
        if not isinstance(like, QuantizedArray):
            return value
        random = random_unit(self.step, slot, value.shape, self.chunk) if self.stochastic else None
        # In chunks values stay in the cache.
        apart = self.chunk is None and jax.default_backend() == "gpu"
        return quantized(value, like.signed, like.block_size, random, self.rule, apart=apart)

    def nonnegative(self, value: jax.Array | Statistics, like: StoredMoment, slot: int | jax.Array) -> StoredMoment:
        """Stores a non-negative state in the form of `like`."""
        if isinstance(value, Statistics):
            assert isinstance(like, RowColumn)
            return RowColumn(*(x if x is None else self.root(x, y, slot) for x, y in zip(value, like, strict=True)))
        assert not isinstance(like, RowColumn)
        return self.root(value, like, slot)

    def root(self, value: jax.Array, like: Stored | None, slot: int | jax.Array) -> Stored:
        """As `nonnegative`, for one tensor."""
        return self.signed(jnp.sqrt(value), like, slot) if isinstance(like, QuantizedArray) else value
