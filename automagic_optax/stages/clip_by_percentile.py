"""Stage 1, `clip_by_percentile`: scales down gradients whose norm is far above the recent ones.

`docs/algorithm.md`, section 4.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_core import check_field
from automagic_core.config.constants import NORM_HISTORY
from automagic_optax.arrays.batches import enter
from automagic_optax.arrays.checks import check_dtypes, dtype_of
from automagic_optax.arrays.means import accurate_total, rounded
from automagic_optax.arrays.with_types import with_types
from automagic_optax.sharding.placement import full, replicated_like, scalar_like
from automagic_optax.stages.energy import energy


class ClipByPercentileState(NamedTuple):
    """The norms of the last 100 recorded steps.

    Attributes:
        norm_history: float32 (100,), a ring of n² = Σ g² over all arrays; zeros before the first recorded step.
        norm_position: int32 scalar, where the next value goes.
        energy_removed: float32 scalar, the share of Σ g² that the stage removed in the last step.
    """

    norm_history: jax.Array
    norm_position: jax.Array
    energy_removed: jax.Array


def clip_by_percentile(percentile: Any = 95) -> optax.GradientTransformationExtraArgs:
    """Scales all gradients down when their norm is above the P-th smallest of the last 100 norms.

    n² is Σ g² over all arrays.  The threshold is entry P, counted from 0, of the sorted ring of the last 100 values of
    n², the current one included.  Where n² is above it,  g ← g · √(threshold / n²).  The first recorded step fills the
    ring.  When n² is 0 or an element is not finite, nothing is recorded and nothing is clipped.

    Args:
        percentile: P in [1, 100], an integer or a traced one; 100 never clips.

    Returns:
        A transformation of any gradients.  It does not need `params`.

    Raises:
        ValueError: `percentile` outside its range; a parameter of an integer or a complex dtype.

    Reference: section 4.1; percentile clipping in bitsandbytes.

    Example:
        >>> tx = optax.chain(clip_by_percentile(95), optax.adam(1e-3))
    """
    # Of an array, such as `optax.inject_hyperparams` makes, the value is not looked at, as with all strengths.
    is_array = isinstance(percentile, jax.Array) and percentile.ndim == 0
    if not (is_array and jnp.issubdtype(percentile.dtype, jnp.integer)):
        check_field("percentile_clipping", percentile, "percentile")

    def init(params: Any) -> ClipByPercentileState:
        check_dtypes(params)
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
        before = batched.map(energy)
        n2 = accurate_total(before)
        records = jnp.isfinite(n2) & (n2 > 0)
        history = state.norm_history
        # Recorded values are positive, so a zero in the ring means that no step was recorded yet.
        written = (jnp.arange(NORM_HISTORY) == state.norm_position) | (history == 0)
        history = jnp.where(records & written, n2, history)
        position = jnp.where(records, (state.norm_position + 1) % NORM_HISTORY, state.norm_position)
        threshold = jnp.sort(history)[jnp.minimum(percentile, NORM_HISTORY - 1)]
        clips = records & (n2 > threshold) & (jnp.asarray(percentile) < 100)
        factor = jnp.where(clips, jnp.sqrt(threshold / jnp.where(clips, n2, threshold)), np.float32(1))
        zero = jnp.minimum(state.norm_position, 0)  # always 0, but the compiler cannot know that
        clipped = batched.map(lambda g: rounded(g.astype(jnp.float32) * factor, zero).astype(dtype_of(g)))
        removed = jnp.where(clips, 1 - jnp.square(factor), np.float32(0))
        return leave(batched.replace(clipped)), ClipByPercentileState(history, position, removed)

    return with_types(optax.GradientTransformationExtraArgs(init, update))
