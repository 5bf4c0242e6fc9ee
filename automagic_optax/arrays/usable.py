"""Decides which arrays are skipped for unusable gradients (`docs/algorithm.md`, section 6.2)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_core.config.constants import GRADIENT_LIMIT
from automagic_optax.arrays.batches import enter
from automagic_optax.arrays.checks import check_dtypes, check_gradients, check_params
from automagic_optax.arrays.means import number


def is_usable(g: jax.Array, limit: float | jax.Array = GRADIENT_LIMIT) -> jax.Array:
    """Whether no element is NaN or above the limit in magnitude: a boolean scalar."""
    g = g.astype(jnp.float32)
    # A maximum may pass over a NaN, but a sum does not.  Both together are cheaper than a test of each element.
    total = jnp.sum(g)
    found: jax.Array = (jnp.max(jnp.abs(g), initial=0) <= number(limit)) & (total == total)
    return found


def refuse_unusable(
    kinds_of: Callable[[Any], Sequence[Hashable]], changed: Callable[[Any], bool]
) -> optax.GradientTransformationExtraArgs:
    """Puts gradients in float32 and in batches, and fills each unusable one with NaN.

    It is the first of the chain, so the raw gradient decides what is skipped: the stages pass on an array with a NaN
    and do not record it, and `scale_by_cameamp` skips it.

    Args:
        kinds_of: from params, one kind for each leaf.  It tells apart what any later stage tells apart, so that all
            stages use the same batches.
        changed: from params, whether a stage changes the gradient of any.  Where none does, gradients pass as they
            are, and `scale_by_cameamp` looks at them.

    Returns:
        A transformation without a state.  Its updates are `Batched`, for stages of this package, or what they were.
    """

    def checked(g: jax.Array) -> jax.Array:
        return jnp.where(is_usable(g), g.astype(jnp.float32), np.float32(np.nan))

    def update(
        updates: Any, state: optax.EmptyState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.EmptyState]:
        del extra_args
        check_params(params)
        if not changed(params):
            return updates, state
        check_gradients(params, updates)
        kinds = [(w.dtype, kind) for w, kind in zip(jax.tree.leaves(params), kinds_of(params), strict=True)]
        batched, _ = enter(updates, params, kinds)
        return batched.replace(batched.map(checked)), state

    def init(params: Any) -> optax.EmptyState:
        check_dtypes(params)
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init, update)
