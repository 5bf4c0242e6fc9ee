"""Packs and unpacks `last_polarity`, the sign bits of the last gradient (`docs/algorithm.md`, section 6.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pack_bits(bits: jax.Array) -> jax.Array:
    """Packs booleans (..., n) into uint8 (..., ceil(n / 8)), least significant bit first; a scalar into (1,)."""
    return jnp.packbits(jnp.atleast_1d(bits), axis=-1, bitorder="little")


def unpack_bits(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `pack_bits` of booleans of the given shape."""
    last = shape[-1] if shape else 1
    return jnp.unpackbits(packed, axis=-1, count=last, bitorder="little").astype(bool).reshape(shape)
