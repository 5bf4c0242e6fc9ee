"""`last_polarity`: the sign bits of the last gradient, 8 to a byte along the last axis, least significant first."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pack_bits(bits: jax.Array) -> jax.Array:
    """Packs booleans of shape (..., n) to uint8 of shape (..., ceil(n / 8)); a scalar to shape (1,)."""
    bits = jnp.atleast_1d(bits)
    return jnp.packbits(bits, axis=-1, bitorder="little")


def unpack_bits(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The booleans of the given shape that `pack_bits` packed."""
    last = shape[-1] if shape else 1
    return jnp.unpackbits(packed, axis=-1, count=last, bitorder="little").astype(bool).reshape(shape)
