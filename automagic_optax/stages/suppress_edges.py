"""Stage 2: smooths gradients where they are rougher than their row usually is (`docs/algorithm.md`, section 4.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from automagic_core import MAX_STEP, Layout, check_field, check_layout, decay, picture_axes, row_shape
from automagic_core.config.constants import EDGE_DECAY
from automagic_optax.arrays.batches import Batched, enter
from automagic_optax.arrays.checks import check_dtypes, check_shapes, dtype_of
from automagic_optax.arrays.containers import flatten_like, held_like, unflatten_like
from automagic_optax.arrays.marks import Mark, resolve_mark
from automagic_optax.arrays.means import accurate_mean, ema, one_minus_power
from automagic_optax.arrays.with_types import with_types
from automagic_optax.sharding.placement import full, replicated_like, statistic_zeros
from automagic_optax.stages.energy import energy, removed_share


class SuppressEdgesState(NamedTuple):
    """How rough the rows of each array usually are.

    Attributes:
        age: tree of int32 scalars, the steps that each array with a history took.
        edge_history: tree of float32 row statistics, the moving average of the row means of |L|; None for arrays that
            the stage leaves alone.
        energy_removed: float32 scalar, the share of Σ g² that the stage removed in the last step.
    """

    age: Any
    edge_history: Any
    energy_removed: jax.Array


def suppress_edges(
    penalty: Any = 0.1,
    threshold: Any = 0.6,
    *,
    layout: Layout = "flax",
    embedding: Mark = None,
    spatial_scope: str = "all",
) -> optax.GradientTransformationExtraArgs:
    """Smooths gradients where they are rougher than their row usually is, by as much as they are rougher.

    L is the 5-point Laplacian of g over the spatial axes, with copies of the borders beyond them.  ĥ is the
    bias-corrected moving average of the row means of |L|.  Then

        g ← g + λ · sign(L) · max(|L| − (1 + θ) · ĥ, 0)

    No element grows beyond the largest magnitude before, and a constant gradient does not change.

    Args:
        penalty: λ in [0, 0.2].
        threshold: θ ≥ 0.
        layout: what the parameters' axes mean, ``"flax"`` or ``"torch"`` (section 1.1).
        embedding: which arrays are embeddings, whose rows are axis 0 in both layouts: a predicate on (path, leaf), a
            tree of booleans, or None for those found by name.
        spatial_scope: ``"conv"`` works on convolution kernels alone, ``"all"`` on matrices too.

    Returns:
        A transformation of any gradients.  It passes on arrays without two spatial axes of length 3 or more, and
        arrays with an element that is not finite, whose states stay.

    Raises:
        ValueError: a strength outside its range; a parameter of an integer or a complex dtype; in update, a
            parameter of another shape than in init.

    Reference: section 4.2; Osher et al., *Laplacian Smoothing Gradient Descent*, arXiv 1806.06317.

    Example:
        >>> tx = optax.chain(suppress_edges(0.1), optax.adam(1e-3))
    """
    check_field("edge_penalty", penalty, "penalty")
    check_field("edge_threshold", threshold, "threshold")
    check_field("spatial_scope", spatial_scope)
    check_layout(layout)

    def init(params: Any) -> SuppressEdgesState:
        check_dtypes(params)
        leaves = jax.tree.leaves(params)
        marks = resolve_mark(embedding, params, "embedding")
        everywhere = replicated_like(params)

        def history(leaf: Any, mark: bool) -> jax.Array | None:
            if picture_axes(leaf.shape, layout, spatial_scope) is None:
                return None
            return statistic_zeros(leaf, row_shape(leaf.shape, layout, mark))

        return SuppressEdgesState(
            age=unflatten_like(params, [full((), 0, jnp.int32, everywhere) for _ in leaves]),
            edge_history=unflatten_like(params, [history(*pair) for pair in zip(leaves, marks, strict=True)]),
            energy_removed=full((), 0, jnp.float32, everywhere),
        )

    def update(
        updates: Any, state: SuppressEdgesState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SuppressEdgesState]:
        del extra_args
        ages = flatten_like(state.age, state.age)
        histories = flatten_like(state.age, state.edge_history)
        if all(history is None for history in histories):
            return updates, state
        if len(jax.tree.leaves(params)) == len(histories):
            check_shapes(params, histories, "edge_history", statistics=True)

        def one(g: jax.Array, age: jax.Array, history: jax.Array | None) -> Any:
            before = energy(g)
            if history is None:
                return g, age, None, before, before
            # The history has length 1 along the columns, so embeddings need no mark here.
            columns = tuple(axis for axis in range(g.ndim) if history.shape[axis] == 1)
            new, new_age, new_history = _smoothed(g, age, history, columns)
            usable = jnp.isfinite(before)
            new = jnp.where(usable, new, g.astype(jnp.float32))
            return (
                new.astype(dtype_of(g)),
                jnp.where(usable, new_age, age),
                jnp.where(usable, new_history, history),
                before,
                energy(new),
            )

        shapes = [None if history is None else history.shape for history in histories]
        batched, leave = enter(updates, state.age, shapes)
        results = batched.map_in_turn(one, ages, histories)
        kept = batched.spread([(result[1], result[2]) for result in results], list(zip(ages, histories, strict=True)))
        found = leave(batched.replace([result[0] for result in results]))
        # Ages are numbers, around which no container stands.
        return found if isinstance(found, Batched) else held_like(updates, found), SuppressEdgesState(
            age=unflatten_like(state.age, [age for age, _ in kept]),
            edge_history=unflatten_like(state.age, [history for _, history in kept]),
            energy_removed=removed_share([result[3] for result in results], [result[4] for result in results]),
        )

    def _smoothed(
        g: jax.Array, age: jax.Array, history: jax.Array, columns: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        axes = picture_axes(g.shape, layout)
        assert axes is not None, "an array with a history has spatial axes"
        g = g.astype(jnp.float32)
        L = laplacian(g, axes)
        beta = decay(EDGE_DECAY)
        age = jnp.minimum(age, MAX_STEP - 1) + 1
        history = ema(beta, history, accurate_mean(jnp.abs(L), columns))
        usual = history * ((1 + jnp.asarray(threshold, jnp.float32)) / one_minus_power(beta, age.astype(jnp.float32)))
        # sign(L) · max(|L| − usual, 0)
        excess = L - jnp.clip(L, -usual, usual)
        return g + jnp.asarray(penalty, jnp.float32) * excess, age, history

    return with_types(optax.GradientTransformationExtraArgs(init, update))


def laplacian(x: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The 5-point Laplacian over two axes, with copies of the borders beyond them.  Constants give exact zeros."""
    return jnp.zeros_like(x) + _second_difference(x, axes[0]) + _second_difference(x, axes[1])


def _second_difference(x: jax.Array, axis: int) -> jax.Array:
    # The shape never changes, so that on a mesh each device exchanges only a single row with its neighbours.
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    to_next = jnp.where(place == x.shape[axis] - 1, 0, _shifted(x, axis, -1) - x)
    from_last = jnp.where(place == 0, 0, x - _shifted(x, axis, 1))
    return to_next - from_last


def _shifted(x: jax.Array, axis: int, places: int) -> jax.Array:
    """x shifted along an axis, with zeros behind it."""
    edges = [(0, 0, 0)] * x.ndim
    edges[axis] = (places, -places, 0)
    return jax.lax.pad(x, jnp.zeros([], x.dtype), edges)
