"""Sums and means that come out the same on any mesh.

In float32 the sum of a thousand numbers depends on the order in which they are added, and a mesh adds in an order of
its own.  Formed in float64 and rounded once at the end, it is the nearest float32 number in whatever order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from automagic_optax.sharding.placement import devices_of

_WITH_FLOAT64 = ("cpu", "gpu", "cuda", "rocm")
"""Backends; others sum in float32, where two meshes may differ by some 10⁻⁷."""


def accurate_sum(x: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """The sum over some axes, float32; with or without ``jax_enable_x64``.

    Args:
        x: float32 array.
        axes: non-negative, ascending; they keep length 1.  None sums over all of them and gives a scalar.
    """
    if jax.default_backend() not in _WITH_FLOAT64:
        return jnp.sum(x, axis=axes if axes is None else tuple(axes), keepdims=axes is not None)
    # XLA would keep one float64 copy of an array for its sums over rows and over columns: so one of them is of −x.
    turned = axes is not None and x.ndim - 1 not in axes
    with jax.enable_x64(True):
        exact = jax.lax.convert_element_type(-x if turned else x, np.float64)
        total = jnp.sum(exact, axis=axes if axes is None else tuple(axes), keepdims=axes is not None)
        total = jax.lax.convert_element_type(total, np.float32)
    return -total if turned else total


def accurate_total(parts: Sequence[jax.Array]) -> jax.Array:
    """The sum of all elements of several float32 arrays, a scalar; 0 without any."""
    flat = [part.reshape(-1) for part in parts]
    return accurate_sum(jnp.concatenate(flat)) if flat else jnp.zeros([], jnp.float32)


def rounded(x: jax.Array, zero: jax.Array) -> jax.Array:
    """x as a float32 array, and not more: a product that the compiler joins with a later sum is not rounded.

    Whether it does so depends on what else the program computes, and so on the mesh.

    Args:
        x: float32 array.
        zero: an integer scalar that is 0.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(bits ^ zero.astype(jnp.uint32), jnp.float32)


def quotient(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """x / divisor for a scalar divisor, with the same rounding on one device and on a mesh.

    XLA turns the division into a product with the reciprocal on one device, and on a mesh only in places.
    """
    return x * (np.float32(1) / divisor) if devices_of(x) > 1 else x / divisor


def accurate_mean(x: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """The mean over some axes, as `accurate_sum`."""
    count = x.size if axes is None else math.prod(x.shape[axis] for axis in axes)
    return accurate_sum(x, axes) / np.float32(count)
