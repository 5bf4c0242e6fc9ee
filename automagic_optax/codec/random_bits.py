"""Random numbers computed from counters, the same under any sharding (`docs/algorithm.md`, section 3.7)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Slot, rounding_key
from automagic_core.codec.random_bits import MIX_MULTIPLIERS, SLOT_MULTIPLIER, STEP_MULTIPLIER


def mix32(x: jax.Array) -> jax.Array:
    """Scrambles uint32 words of any shape, like `automagic_core.mix32`."""
    x = x ^ (x >> 16)
    x = x * np.uint32(MIX_MULTIPLIERS[0])
    x = x ^ (x >> 15)
    x = x * np.uint32(MIX_MULTIPLIERS[1])
    return x ^ (x >> 16)


def element_index(shape: tuple[int, ...]) -> jax.Array:
    """Row-major index of every element, modulo 2³²: uint32 of the given shape.

    It is a sum over axes and not a reshaped count, so that each device computes its own part and nothing moves.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return index


class Chunk(NamedTuple):
    """Where a chunk of an array lies: `start`, the index of its first element, and `size`, that of the whole array."""

    start: jax.Array
    size: int


def random_unit(
    step: jax.Array | int, slot: int | jax.Array, shape: tuple[int, ...], chunk: Chunk | None = None
) -> jax.Array:
    """A random number r in [0, 1) with 24 bits for each element.

    Args:
        step: t ≥ 1, an integer scalar.
        slot: one of `automagic_core.Slot`, or another number ≥ 5; traced where it is one of several.
        shape: shape of the whole array, or of its chunk.
        chunk: which chunk; None for the whole array.

    Returns:
        float32 array of the given shape.
    """
    size = math.prod(shape) if chunk is None else chunk.size
    salt: Any = np.uint32(size % 2**32)
    if isinstance(slot, int):
        salt = np.uint32((int(slot) * SLOT_MULTIPLIER + size) % 2**32)
    else:
        salt = slot.astype(jnp.uint32) * np.uint32(SLOT_MULTIPLIER) + salt
    key = mix32(jnp.asarray(step).astype(jnp.uint32) * np.uint32(STEP_MULTIPLIER) + salt)
    bits = mix32(_index(shape, chunk) + key)
    return (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)


def walk_signs(shape: tuple[int, ...], chunk: Chunk | None = None) -> jax.Array:
    """The signs σ of the walk, −1 or 1, the same at every step (`docs/algorithm.md`, section 5.8).

    Args:
        shape, chunk: as for `random_unit`.

    Returns:
        float32 array of the given shape.
    """
    size = math.prod(shape) if chunk is None else chunk.size
    bits = mix32(_index(shape, chunk) + np.uint32(rounding_key(0, Slot.walk, size)))
    return jnp.where(bits >> 31 == 0, np.float32(1), np.float32(-1))


def _index(shape: tuple[int, ...], chunk: Chunk | None) -> jax.Array:
    index = element_index(shape)
    return index if chunk is None else index + chunk.start.astype(jnp.uint32)
