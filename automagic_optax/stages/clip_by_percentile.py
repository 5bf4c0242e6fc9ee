"""Stage 1: gradients far above their recent norms are scaled down (section 4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_core import check_field
from automagic_core.config.constants import NORM_HISTORY
from automagic_optax.arrays.batches import enter
from automagic_optax.arrays.means import accurate_total, rounded
from automagic_optax.arrays.with_types import with_types
from automagic_optax.sharding.placement import full, replicated_like, scalar_like
from automagic_optax.stages.energy import energy


class ClipByPercentileState(NamedTuple):
    """The norms of the last 100 recorded steps.

    Attributes:
        norm_history: float32 (100,), a ring of n² = Σ g² over all arrays; zeros before the first.
        norm_position: int32 scalar, where the next one goes.
        energy_removed: float32 scalar, the share of Σ g² that the last step took away.
    """

    norm_history: jax.Array
    norm_position: jax.Array
    energy_removed: jax.Array


def clip_by_percentile(percentile: Any = 95) -> optax.GradientTransformationExtraArgs:
    """Scales all gradients down to the P-th smallest of their last 100 norms when they are above it.

    With n² = Σ g² over all arrays and threshold² the P-th entry, counted from 0, of the sorted ring of the last 100
    values of n², this one included:  g ← g · √(threshold² / n²) where n² > threshold².  The first recorded step fills
    the ring.  A step is not recorded and nothing is clipped where n² is 0 or an element is not finite.

    Args:
        percentile: P in [1, 100]; 100 never clips.

    Returns:
        A transformation of any gradients; it does not need params.

    Raises:
        ValueError: `percentile` outside its range.

    Reference: section 4; percentile clipping in bitsandbytes.

    Example:
        >>> tx = optax.chain(clip_by_percentile(95), optax.adam(1e-3))
    """
    check_field("percentile_clipping", percentile)

    def init(params: Any) -> ClipByPercentileState:
        return ClipByPercentileState(
            full((NORM_HISTORY,), 0, jnp.float32, replicated_like(params)),
            scalar_like(params, 0, jnp.int32),
            scalar_like(params, 0, jnp.float32),
        )

    def update(
        updates: Any, state: ClipByPercentileState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ClipByPercentileState]:
        del params, extra_args
        batched, leave = enter(updates, updates)
        before = batched.map(lambda g, form: energy(g))
        n2 = accurate_total(before)
        records = jnp.isfinite(n2) & (n2 > 0)
        history = state.norm_history
        # Recorded values are positive: a zero in the ring means that there was none yet.
        place = (jnp.arange(NORM_HISTORY) == state.norm_position) | (history == 0)
        history = jnp.where(records & place, n2, history)
        position = jnp.where(records, (state.norm_position + 1) % NORM_HISTORY, state.norm_position)
        threshold = jnp.sort(history)[jnp.minimum(percentile, NORM_HISTORY - 1)]
        clips = records & (n2 > threshold) & (jnp.asarray(percentile) < 100)
        factor = jnp.where(clips, jnp.sqrt(threshold / n2), np.float32(1))
        zero = jnp.minimum(state.norm_position, 0)  # which the compiler cannot know
        clipped = batched.map(lambda g, form: rounded(g.astype(jnp.float32) * factor, zero).astype(g.dtype))
        removed = jnp.where(clips, 1 - jnp.square(factor), np.float32(0))
        return leave(batched.replace(clipped)), ClipByPercentileState(history, position, removed)

    return with_types(optax.GradientTransformationExtraArgs(init, update))
