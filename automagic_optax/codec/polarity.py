"""Packs and unpacks `last_polarity`, the sign bits of the last gradient (`docs/algorithm.md`, section 6.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pack_bits(bits: jax.Array) -> jax.Array:
    """Packs booleans of shape (..., n) into uint8 of shape (..., ceil(n / 8)), a scalar into shape (1,).

    The least significant bit is the first element.
    """
    bits = jnp.atleast_1d(bits)
    return jnp.packbits(bits, axis=-1, bitorder="little")


def unpack_bits(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `pack_bits` of booleans of the given shape."""
    last = shape[-1] if shape else 1
    return jnp.unpackbits(packed, axis=-1, count=last, bitorder="little").astype(bool).reshape(shape)
