"""Exponential moving averages and their bias correction, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Decay

Array = jax.Array
f32 = np.float32


def remainder(decay: Decay, t: Array) -> Array:
    """1 − βᵗ, from constants formed in float64; t is a float32 scalar."""
    return -jnp.expm1(t * f32(decay.log))


def average(decay: Decay, old: Array, new: Array) -> Array:
    """β · old + (1 − β) · new."""
    return f32(decay.beta) * old + f32(decay.complement) * new
