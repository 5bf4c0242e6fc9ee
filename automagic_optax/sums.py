"""Sums and means that stay accurate on small arrays of several axes.

XLA's CPU backend sums long axes in a tree, but adds up several short ones in one float32 accumulator: 2,880 equal
numbers in an array of shape (8, 6, 3, 5, 4) come out wrong by 3 · 10⁻⁵.  As one axis they come out right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from automagic_optax.placement import devices_of

_SMALL = 2**16
"""Elements up to which axes are merged; above it the tree is deep enough."""


def accurate_sum(x: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """The sum over some axes.

    Args:
        x: float32 array.
        axes: non-negative, ascending; they keep length 1.  None sums over all of them and gives a scalar.
    """
    if devices_of(x) > 1 and max(x.shape, default=1) < x.size <= _SMALL:
        return _axis_by_axis(x, axes)
    if axes is None:
        return jnp.sum(_merged(x, (-1,)) if x.ndim > 1 and x.size <= _SMALL else x)
    kept = tuple(1 if axis in axes else n for axis, n in enumerate(x.shape))
    if x.size > _SMALL or len(axes) < 2 or axes[-1] - axes[0] != len(axes) - 1:
        return jnp.sum(x, axis=tuple(axes), keepdims=True)
    count = math.prod(x.shape[axis] for axis in axes)
    merged = _merged(x, (*x.shape[: axes[0]], count, *x.shape[axes[-1] + 1 :]))
    return jnp.sum(merged, axis=axes[0]).reshape(kept)


def _axis_by_axis(x: jax.Array, axes: Sequence[int] | None) -> jax.Array:
    """The same over axes that may be split over devices: merging them would move the array between devices."""
    for axis in reversed(range(x.ndim) if axes is None else axes):
        # Without the barrier XLA would make one sum of all of them.
        x = jax.lax.optimization_barrier(jnp.sum(x, axis=axis, keepdims=True))
    return x.reshape(()) if axes is None else x


def _merged(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # Without the barrier XLA would see through the reshape and sum over the short axes after all.
    return jax.lax.optimization_barrier(x.reshape(shape))


def quotient(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """x / divisor for a scalar divisor, with the same rounding on one device and on a mesh.

    XLA turns the division into a product with the reciprocal on one device, and on a mesh only in places.
    """
    return x * (np.float32(1) / divisor) if devices_of(x) > 1 else x / divisor


def accurate_mean(x: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """The mean over some axes, as `accurate_sum`."""
    count = x.size if axes is None else math.prod(x.shape[axis] for axis in axes)
    return accurate_sum(x, axes) / np.float32(count)
