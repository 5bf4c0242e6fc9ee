"""Reads states as float32 and stores them again, companded where they are never negative.

`docs/algorithm.md`, section 3.4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from automagic_optax.codec.quantized_array import QuantizedArray, RoundingRule, exact_rule, quantize
from automagic_optax.codec.random_bits import random_unit


class RowColumn(NamedTuple):
    """A factored state: the moving averages of an array's row means and column means, float32, dimensions kept."""

    row: jax.Array
    column: jax.Array


Stored = jax.Array | QuantizedArray
StoredMoment = Stored | RowColumn


def read_signed(stored: Stored) -> jax.Array:
    """The float32 values of a signed state."""
    return stored.dequantize() if isinstance(stored, QuantizedArray) else stored


def read_nonnegative(stored: StoredMoment) -> jax.Array | RowColumn:
    """The float32 values of a non-negative state; row and column statistics as they are."""
    return jnp.square(stored.dequantize()) if isinstance(stored, QuantizedArray) else stored


class Writer(NamedTuple):
    """Stores float32 values in the form of a state.

    Attributes:
        step: t, for the random bits.
        stochastic: round stochastically, else to nearest.
        rule: how a normalized value becomes a code.
    """

    step: jax.Array
    stochastic: bool
    rule: RoundingRule = exact_rule

    def signed(self, value: jax.Array, like: Stored, slot: int) -> Stored:
        """Stores a signed state in the form of `like`, with the random bits of `slot`."""
        if not isinstance(like, QuantizedArray):
            return value
        random = random_unit(self.step, slot, value.shape) if self.stochastic else None
        return quantize(value, signed=like.signed, block_size=like.block_size, random=random, rule=self.rule)

    def nonnegative(self, value: jax.Array | RowColumn, like: StoredMoment, slot: int) -> StoredMoment:
        """Stores a non-negative state in the form of `like`; row and column statistics stay float32."""
        if isinstance(value, RowColumn) or not isinstance(like, QuantizedArray):
            return value
        return self.signed(jnp.sqrt(value), like, slot)
