"""Measures how much of the gradients' energy a stage removes (`docs/algorithm.md`, section 13)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from automagic_optax.arrays.means import accurate_sum, accurate_total


def energy(g: jax.Array) -> jax.Array:
    """Σ g² in float32.  It is finite exactly where the array can be used."""
    return accurate_sum(jnp.square(g.astype(jnp.float32)))


def removed_share(before: Sequence[jax.Array], after: Sequence[jax.Array]) -> jax.Array:
    """1 − Σ after / Σ before over all usable arrays: negative where a stage adds energy, 0 without usable arrays.

    Args:
        before, after: Σ g² of every array or batch of arrays.
    """
    # A report, so derivatives do not go through it.
    before, after = jax.lax.stop_gradient((list(before), list(after)))
    total_before = accurate_total([jnp.where(jnp.isfinite(b), b, 0) for b in before])
    total_after = accurate_total([jnp.where(jnp.isfinite(b), a, 0) for b, a in zip(before, after, strict=True)])
    share = 1 - total_after / jnp.where(total_before > 0, total_before, np.float32(1))
    return jnp.where(total_before > 0, share, np.float32(0))
