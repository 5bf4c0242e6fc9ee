"""Sums, means and moving averages; sums in float64, so that every mesh gives the same result (section 1.6).

A float32 sum depends on the order of its terms, and each mesh has an order of its own.  A sum formed in float64 and
rounded once at the end does not.  Chunks of a large array have one order, and sum in float32 (`in_chunks`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Decay
from automagic_core.config.ranges import is_checkable
from automagic_optax.sharding.placement import devices_of

WITH_FLOAT64 = ("cpu", "gpu", "cuda", "rocm")
"""Backends that have float64.  The others sum in float32, and two meshes may differ by some 10⁻⁷."""

_FLOAT32: contextvars.ContextVar[bool] = contextvars.ContextVar("_FLOAT32", default=False)


@contextlib.contextmanager
def float32_sums() -> Iterator[None]:
    """Inside of it sums are float32: in chunks on a single device, where the order is always the same."""
    token = _FLOAT32.set(True)
    try:
        yield
    finally:
        _FLOAT32.reset(token)


def accurate_sum(x: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """The sum over some axes, float32; with or without ``jax_enable_x64``.

    Args:
        x: float32 array.
        axes: non-negative, ascending; they keep length 1.  None sums over all axes and gives a scalar.
    """
    if _FLOAT32.get() or jax.default_backend() not in WITH_FLOAT64:
        return _float32_sum(x, axes)
    # One of the sums over rows and over columns is formed of −x.  This saves memory: otherwise XLA shares one float64
    # copy of the array between both sums, and stores it.
    negated = axes is not None and x.ndim - 1 not in axes
    with jax.enable_x64(True):
        exact = jax.lax.convert_element_type(-x if negated else x, np.float64)
        total = jnp.sum(exact, axis=axes if axes is None else tuple(axes), keepdims=axes is not None)
        total = jax.lax.convert_element_type(total, np.float32)
    return -total if negated else total


def _float32_sum(x: jax.Array, axes: Sequence[int] | None) -> jax.Array:
    """One axis after another, the last first: the error grows with the root of the longest axis, not of the size."""
    for axis in reversed(range(x.ndim) if axes is None else axes):
        x = jnp.sum(x, axis=axis, keepdims=axes is not None)
    return x


def accurate_total(parts: Sequence[jax.Array]) -> jax.Array:
    """The sum of all elements of several float32 arrays, a scalar; 0 without any."""
    flat = [part.reshape(-1) for part in parts]
    return accurate_sum(jnp.concatenate(flat)) if flat else jnp.zeros([], jnp.float32)


@jax.custom_jvp
def rounded(x: jax.Array, zero: jax.Array) -> jax.Array:
    """x, rounded to float32 before anything else uses it.

    The compiler may join a product with a later sum and then does not round the product.  Whether it does so depends on
    the rest of the program, and so on the mesh.

    Args:
        x: float32 array.
        zero: an integer scalar that is 0, which the compiler must not know.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(bits ^ zero.astype(jnp.uint32), jnp.float32)


rounded.defjvps(lambda dx, rounded_x, x, zero: dx, None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def ratio(x: jax.Array, divisor: jax.Array, inverts: bool = False) -> jax.Array:
    """x / divisor, or with `inverts` x times the reciprocal, whose derivative is finite for a tiny divisor too.

    JAX forms divisor⁻², which is infinite below 5 · 10⁻²⁰, and NaN times 0.
    """
    return x * (np.float32(1) / divisor) if inverts else x / divisor


@ratio.defjvp
def _of_ratio(inverts: bool, primals: Any, tangents: Any) -> Any:
    found, (dx, d_divisor) = ratio(*primals, inverts), tangents
    return found, ratio(dx - found * d_divisor, primals[1])


def number(x: Any) -> Any:
    """A field in float32: a constant of the program, or a scalar where its value is not known yet."""
    return np.float32(x) if is_checkable(x) else jnp.asarray(x, jnp.float32)


def quotient(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """x / divisor for a scalar divisor, with the same rounding on one device and on a mesh.

    On one device XLA multiplies by the reciprocal instead, but on a mesh it does so only sometimes.
    """
    return ratio(x, divisor, devices_of(x) > 1)


@jax.custom_jvp
def square_root(x: jax.Array) -> jax.Array:
    """√x, whose derivative at 0 is 0."""
    return jnp.sqrt(x)


square_root.defjvps(lambda dx, found, x: jnp.where(x > 0, np.float32(0.5) / found, np.float32(0)) * dx)


def accurate_mean(x: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """The mean over some axes, formed like `accurate_sum`."""
    count = x.size if axes is None else math.prod(x.shape[axis] for axis in axes)
    return accurate_sum(x, axes) / np.float32(count)


def ema(decay: Decay, old: jax.Array, value: jax.Array) -> jax.Array:
    """β · old + (1 − β) · value, an exponential moving average."""
    return np.float32(decay.beta) * old + np.float32(decay.complement) * value


def one_minus_power(decay: Decay, age: jax.Array) -> jax.Array:
    """1 − β^age for a float32 scalar `age`, from constants formed in float64 (section 1.5)."""
    return -jnp.expm1(age * np.float32(decay.log))
