"""Stage 4: shrinks the weak singular directions of adapters (`docs/algorithm.md`, section 4.4)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_core import Layout, check_field, check_layout, row_axis
from automagic_optax.arrays.batches import enter
from automagic_optax.arrays.checks import check_dtypes, check_params, dtype_of
from automagic_optax.arrays.containers import flatten_like, unflatten_like
from automagic_optax.arrays.in_chunks import chunk_count, in_chunks, runs_in_chunks
from automagic_optax.arrays.marks import Mark, resolve_mark
from automagic_optax.arrays.with_types import with_types
from automagic_optax.sharding.placement import full, replicated_like, whole
from automagic_optax.stages.energy import energy, removed_share
from automagic_optax.stages.spectrum import (
    Directions,
    directions,
    effective_rank,
    gram,
    narrowed,
    product,
    scaled,
    wide_numbers,
    widened,
)


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
        ValueError: a strength outside its range; a parameter of an integer or a complex dtype; in update, params
            missing.

    Reference: section 4.4.

    Example:
        >>> tx = optax.chain(encourage_low_rank(0.01), optax.adam(1e-3))
    """
    check_field("rank_penalty_strength", strength, "strength")
    check_field("low_rank_emphasis", emphasis, "emphasis")
    check_layout(layout)

    def init(params: Any) -> EncourageLowRankState:
        check_dtypes(params)
        leaves, marks = jax.tree.leaves(params), resolve_mark(lora, params, "lora")
        everywhere = replicated_like(params)
        ranks = [
            full((), 0, jnp.float32, everywhere) if mark and leaf.ndim == 2 and leaf.size > 0 else None
            for leaf, mark in zip(leaves, marks, strict=True)
        ]
        return EncourageLowRankState(unflatten_like(params, ranks), full((), 0, jnp.float32, everywhere))

    def one(g: jax.Array, w: jax.Array, rank: jax.Array | None) -> tuple[Any, ...]:
        if rank is None:
            before = energy(g)
            return g, None, before, before
        new, new_rank, before = _encouraged(g, w, strength, emphasis, transposes(w.shape))
        return new.astype(dtype_of(g)), new_rank, before, energy(new)

    def batch(g: jax.Array, w: jax.Array, rank: jax.Array | None) -> tuple[Any, ...]:
        size = g.size // g.shape[0]
        count = chunk_count(g.shape[0], size) if rank is not None and runs_in_chunks(g) else 1
        if count == 1:
            return jax.vmap(one)(g, w, rank)
        new, rank, before, after = _encouraged_in_chunks(g, w, strength, emphasis, transposes(g.shape[1:]), count)
        return new.astype(dtype_of(g)), rank, before, after

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
        if all(rank is None for rank in ranks):
            return updates, state
        kinds = [(w.dtype, rank is not None) for w, rank in zip(weights, ranks, strict=True)]
        batched, leave = enter(updates, params, kinds)
        results = batched.map(one, weights, ranks, batch=batch)
        return leave(batched.replace([result[0] for result in results])), EncourageLowRankState(
            unflatten_like(params, batched.spread([result[1] for result in results], ranks)),
            removed_share([result[2] for result in results], [result[3] for result in results]),
        )

    return with_types(optax.GradientTransformationExtraArgs(init, update))


class _Look(NamedTuple):
    """What is read of one adapter: g and W with the shorter side first, Σ g², whether W is usable, and W Wᵀ."""

    g: jax.Array
    W: jax.Array
    energy: jax.Array
    usable: jax.Array
    gram: jax.Array


def _look(g: jax.Array, w: jax.Array, transposed: bool) -> _Look:
    gradient, weight = g.astype(jnp.float32), w.astype(jnp.float32)
    W, usable = scaled(whole(weight.T if transposed else weight))
    with wide_numbers():
        return _Look(whole(gradient.T if transposed else gradient), W, energy(g), usable, gram(W))


def _directions(gram: jax.Array) -> tuple[Directions, jax.Array]:
    with wide_numbers():
        return directions(gram), effective_rank(gram)


def _turned(seen: _Look, found: Directions, strength: Any, emphasis: Any, transposed: bool) -> jax.Array:
    """The new gradient."""
    g = seen.g
    with wide_numbers():
        T = narrowed(product(found.tail, widened(seen.W)))
    # The root has no derivative at 0; a gradient of zeros stays zero whatever W is.
    some = seen.energy > 0
    norm = jnp.where(some, jnp.sqrt(jnp.where(some, seen.energy, np.float32(1))), np.float32(0))
    strong = g - product(found.weak, g)
    pull = jnp.asarray(strength, jnp.float32) * norm / found.length
    new = g + (jnp.asarray(emphasis, jnp.float32) - 1) * strong + pull * T
    new = whole(jnp.where(seen.usable & jnp.isfinite(seen.energy), new, g))
    return new.T if transposed else new


def _encouraged(
    g: jax.Array, w: jax.Array, strength: Any, emphasis: Any, transposed: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The new gradient, the effective rank of w, and Σ g² before."""
    seen = _look(g, w, transposed)
    found, rank = _directions(seen.gram)
    new = _turned(seen, found, strength, emphasis, transposed)
    return new, jnp.where(seen.usable, rank, np.float32(0)), seen.energy


def _encouraged_in_chunks(
    g: jax.Array, w: jax.Array, strength: Any, emphasis: Any, transposed: bool, count: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`_encouraged` of a batch, and Σ g² after; only its small matrices are all in memory at once."""
    look = functools.partial(_look, transposed=transposed)
    blank = jax.eval_shape(jax.vmap(look), g, w)
    keep = ("energy", "usable", "gram")
    with wide_numbers():
        into = {name: jnp.zeros(getattr(blank, name).shape, getattr(blank, name).dtype) for name in keep}

    def first(_: Any, chunk: Any) -> Any:
        seen = jax.vmap(look)(*chunk)
        return {name: getattr(seen, name) for name in keep}, ()

    with wide_numbers():
        seen, _ = in_chunks(first, count, (g, w), into)
    found, rank = jax.vmap(_directions)(seen["gram"])

    def turn(g: jax.Array, w: jax.Array, known: Any, found: Directions) -> Any:
        W, _ = scaled(w.astype(jnp.float32).T if transposed else w.astype(jnp.float32))
        gradient = g.astype(jnp.float32)
        here = _Look(gradient.T if transposed else gradient, W, known["energy"], known["usable"], known["gram"])
        new = _turned(here, found, strength, emphasis, transposed)
        return new, energy(new)

    after = jnp.zeros(g.shape[0], jnp.float32)
    arrays = (g, w, seen, found)
    results = (g.astype(jnp.float32), after)
    with wide_numbers():
        (new, after), _ = in_chunks(lambda _, chunk: (jax.vmap(turn)(*chunk), ()), count, arrays, results)
    return new, jnp.where(seen["usable"], rank, np.float32(0)), seen["energy"], after
