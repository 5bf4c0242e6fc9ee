"""Exponential moving averages and their bias correction, in float32 (`docs/algorithm.md`, section 1.5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Decay

f32 = np.float32


def ema(decay: Decay, old: jax.Array, value: jax.Array) -> jax.Array:
    """β · old + (1 − β) · value."""
    return f32(decay.beta) * old + f32(decay.complement) * value


def one_minus_power(decay: Decay, age: jax.Array) -> jax.Array:
    """1 − β^age for a float32 scalar `age`, from constants formed in float64."""
    return -jnp.expm1(age * f32(decay.log))
