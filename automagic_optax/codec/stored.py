"""The layer between the codec and the mathematics: states are read as float32 and written from float32.

Signed states (`exp_avg`, `s`) are stored as they are.  Non-negative states (`exp_avg_sq`, `exp_avg_res`) are companded:
their square root is stored with the unsigned codebook and squared when read, which keeps small second moments from
reading back as zero (section 3).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from automagic_optax.codec import quantized_array as codec
from automagic_optax.codec.random_bits import random_unit


class RowColumn(NamedTuple):
    """A factored statistic: the moving averages of an array's row means and column means, float32, dims kept."""

    row: jax.Array
    column: jax.Array


Stored = jax.Array | codec.QuantizedArray
StoredMoment = Stored | RowColumn


def read_signed(stored: Stored) -> jax.Array:
    """The float32 values of a signed state."""
    return stored.dequantize() if isinstance(stored, codec.QuantizedArray) else stored


def read_nonnegative(stored: StoredMoment) -> jax.Array | RowColumn:
    """The float32 values of a non-negative state; row and column statistics are returned as they stand."""
    return jnp.square(stored.dequantize()) if isinstance(stored, codec.QuantizedArray) else stored


class Writer(NamedTuple):
    """Writes float32 values in the form in which a state is stored.

    Attributes:
        step: t, which the random bits depend on.
        stochastic: round stochastically, else to nearest.
        rule: how a normalized value becomes a code.
    """

    step: jax.Array
    stochastic: bool
    rule: codec.RoundingRule = codec.exact_rule

    def signed(self, value: jax.Array, like: Stored, slot: int) -> Stored:
        """Stores a signed state in the form of `like`, with random bits of its own for each `slot`."""
        if not isinstance(like, codec.QuantizedArray):
            return value
        random = random_unit(self.step, slot, value.shape) if self.stochastic else None
        return codec.quantize(value, signed=like.signed, block_size=like.block_size, random=random, rule=self.rule)

    def nonnegative(self, value: jax.Array | RowColumn, like: StoredMoment, slot: int) -> StoredMoment:
        """Stores a non-negative state in the form of `like`; row and column statistics stay float32."""
        if isinstance(value, RowColumn) or not isinstance(like, codec.QuantizedArray):
            return value
        return self.signed(jnp.sqrt(value), like, slot)
