"""Gradients that cannot be used: with an element that is not finite, or whose square leaves float32 (section 6)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_core.config.constants import GRADIENT_LIMIT
from automagic_optax.arrays.batches import enter
from automagic_optax.arrays.checks import check_dtypes, check_params


def is_usable(g: jax.Array, limit: float = GRADIENT_LIMIT) -> jax.Array:
    """Boolean scalar: no element is NaN or above the limit in magnitude."""
    g = g.astype(jnp.float32)
    # A maximum may pass over a NaN, a sum does not; both together are cheaper than a test of each element.
    total = jnp.sum(g)
    return (jnp.max(jnp.abs(g), initial=0) <= np.float32(limit)) & (total == total)


def refuse_unusable(forms_of: Callable[[Any], Sequence[Hashable]]) -> optax.GradientTransformationExtraArgs:
    """Turns gradients into float32, every array that cannot be used into NaN, and all into batches.

    First of the chain, before section 4: its stages pass on an array with a NaN and do not record it, and
    `scale_by_cameamp` skips it.  So it is the raw gradient that decides.

    Args:
        forms_of: from params, what arrays of one batch must have in common besides shapes and dtypes: whatever the
            stages that follow tell apart, so that they find their batches ready.

    Returns:
        A transformation without a state; its updates are `Batched`, for stages of this package.
    """

    def checked(g: jax.Array, form: Any) -> jax.Array:
        del form
        return jnp.where(is_usable(g), g.astype(jnp.float32), np.float32(np.nan))

    def update(
        updates: Any, state: optax.EmptyState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.EmptyState]:
        del extra_args
        check_params(params)
        forms = [(w.dtype, form) for w, form in zip(jax.tree.leaves(params), forms_of(params), strict=True)]
        batched, _ = enter(updates, params, forms)
        return batched.replace(batched.map(checked)), state

    def init(params: Any) -> optax.EmptyState:
        check_dtypes(params)
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init, update)
