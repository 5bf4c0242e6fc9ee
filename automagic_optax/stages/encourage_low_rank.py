"""Stage 4: shrinks the weak singular directions of adapters (`docs/algorithm.md`, section 4.4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_core import Layout, check_field, check_layout, row_axis
from automagic_optax.arrays.batches import enter
from automagic_optax.arrays.checks import check_params
from automagic_optax.arrays.containers import flatten_like, unflatten_like
from automagic_optax.arrays.marks import Mark, resolve_mark
from automagic_optax.arrays.means import accurate_sum
from automagic_optax.arrays.with_types import with_types
from automagic_optax.sharding.placement import full, replicated_like, whole
from automagic_optax.stages.energy import energy, removed_share
from automagic_optax.stages.spectrum import effective_rank, scaled, tail_and_strong


class EncourageLowRankState(NamedTuple):
    """What the stage saw in the last step, for dashboards.  The stage needs only which arrays are adapters.

    Attributes:
        effective_rank: tree of float32 scalars, exp of the entropy of each adapter's normalized singular values at the
            last step (0 before the first); None for every other array.
        energy_removed: float32 scalar, the share of Σ g² that the stage removed in the last step.
    """

    effective_rank: Any
    energy_removed: jax.Array


def encourage_low_rank(
    strength: Any = 0.01, emphasis: Any = 1.2, *, layout: Layout = "flax", lora: Mark = None
) -> optax.GradientTransformationExtraArgs:
    """Pulls the weak singular directions of adapters towards zero and favours the strong ones.

    W is the parameter with its shorter side first, W Wᵀ = Q diag(λ) Qᵀ, λ̄ is the mean of λ, δ² = 10⁻² · max λ and
    ωᵢ = 1 / (1 + (λᵢ / λ̄)²).  Then

        T = Q diag(ωᵢ / √(λᵢ + δ²)) Qᵀ W,    P = Q diag(1 − ωᵢ) Qᵀ
        g ← g + (ε − 1) · P g + ρ · (‖g‖ / ‖T‖) · T

    Args:
        strength: ρ in [0, 1).
        emphasis: ε ≥ 1.
        layout: what the parameters' axes mean, ``"flax"`` or ``"torch"`` (section 1.1).
        lora: which arrays are adapters: a predicate on (path, leaf), a tree of booleans, or None for those found by
            type and name.  Only arrays with two axes can be adapters.

    Returns:
        A transformation whose update needs `params`.  It passes on arrays that are no adapters, gradients with an
        element that is not finite, and gradients of a parameter that is zero or not finite.

    Raises:
        ValueError: a strength outside its range; params missing in update.

    Reference: section 4.4.

    Example:
        >>> tx = optax.chain(encourage_low_rank(0.01), optax.adam(1e-3))
    """
    check_field("rank_penalty_strength", strength)
    check_field("low_rank_emphasis", emphasis)
    check_layout(layout)

    def init(params: Any) -> EncourageLowRankState:
        leaves, marks = jax.tree.leaves(params), resolve_mark(lora, params, "lora")
        everywhere = replicated_like(params)
        ranks = [
            full((), 0, jnp.float32, everywhere) if mark and leaf.ndim == 2 and leaf.size > 0 else None
            for leaf, mark in zip(leaves, marks, strict=True)
        ]
        return EncourageLowRankState(unflatten_like(params, ranks), full((), 0, jnp.float32, everywhere))

    def one(g: jax.Array, w: jax.Array, rank: jax.Array | None) -> tuple[Any, ...]:
        before = energy(g)
        if rank is None:
            return g, None, before, before
        gradient, weight = g.astype(jnp.float32), w.astype(jnp.float32)
        new, new_rank = _encouraged(gradient, weight, strength, emphasis, transposes(w.shape))
        new = jnp.where(jnp.isfinite(before), new, gradient)
        return new.astype(g.dtype), new_rank, before, energy(new)

    def transposes(shape: tuple[int, ...]) -> bool:
        # If the sides are equal, the row axis is first.  An embedding is never an adapter.
        return shape[1] < shape[0] or (shape[0] == shape[1] and row_axis(2, layout) == 1)

    def update(
        updates: Any, state: EncourageLowRankState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EncourageLowRankState]:
        del extra_args
        check_params(params)
        weights = jax.tree.leaves(params)
        # `init` found the adapters: it saw types that flax hides from `update`.
        ranks = flatten_like(params, state.effective_rank)
        kinds = [(w.dtype, rank is not None) for w, rank in zip(weights, ranks, strict=True)]
        batched, leave = enter(updates, params, kinds)
        results = batched.map(one, weights, ranks)
        return leave(batched.replace([result[0] for result in results])), EncourageLowRankState(
            unflatten_like(params, batched.spread([result[1] for result in results], ranks)),
            removed_share([result[2] for result in results], [result[3] for result in results]),
        )

    return with_types(optax.GradientTransformationExtraArgs(init, update))


def _encouraged(
    g: jax.Array, w: jax.Array, strength: Any, emphasis: Any, transposed: bool
) -> tuple[jax.Array, jax.Array]:
    """The new gradient and the effective rank of w."""
    gradient = whole(g.T if transposed else g)
    W, usable = scaled(whole(w.T if transposed else w))
    T, P_g, values = tail_and_strong(W, gradient)
    pull = jnp.asarray(strength, jnp.float32) * _norm(gradient) / _norm(T)
    new = gradient + (jnp.asarray(emphasis, jnp.float32) - 1) * P_g + pull * T
    new = whole(jnp.where(usable, new, gradient))
    rank = jnp.where(usable, effective_rank(values), np.float32(0))
    return new.T if transposed else new, rank


def _norm(x: jax.Array) -> jax.Array:
    square = accurate_sum(jnp.square(x))
    # The root has no derivative at 0; a gradient of zeros stays zero whatever W is.
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, np.float32(1))), np.float32(0))
