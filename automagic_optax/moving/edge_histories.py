"""The `edge_history` of a run that lacks it, or has it with another age than the array's (section 10.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Layout, picture_axes, row_shape
from automagic_core.arrays.bias import weight_seen
from automagic_core.arrays.parts import elements
from automagic_core.config.constants import EDGE_DECAY, SQUARES_OF_LAPLACIAN
from automagic_optax.arrays.containers import flatten_like
from automagic_optax.arrays.means import accurate_mean
from automagic_optax.codec.stored import StoredMoment, read_root, tensors_of
from automagic_optax.stages.suppress_edges import SuppressEdgesState, laplacian

f32 = np.float32

ESTIMATED = "edge_history is estimated from the second moments"

_ROWS: Sequence[tuple[Layout, bool]] = (("flax", False), ("torch", False), ("flax", True))
"""Layouts, and whether an array is an embedding: all pairs that give different rows."""


class EdgeHistory(NamedTuple):
    """What `SuppressEdgesState` holds for one array."""

    age: Any
    history: Any


def edge_histories(params: Any, edges: SuppressEdgesState | None) -> list[EdgeHistory]:
    """That of every array; both None without a state."""
    if edges is None:
        return [EdgeHistory(None, None)] * len(jax.tree.leaves(params))
    trees = (flatten_like(params, edges.age), flatten_like(params, edges.edge_history))
    return [EdgeHistory(*pair) for pair in zip(*trees, strict=True)]


def estimated(v_hat: jax.Array, like: jax.Array, age: int) -> EdgeHistory:
    """What independent gradients of variance v̂ would give, as in PyTorch, with the array's age.

    With the age of a new run the two frameworks would go on differently once the run is carried over.

    Args:
        v_hat: v̂, float32 in the array's shape.
        like: a history in its shape, which tells the layout.
        age: the array's, ≥ 1.
    """
    shape = v_hat.shape
    layouts = (layout for layout, mark in _ROWS if row_shape(shape, layout, mark) == like.shape)
    axes = next(found for layout in layouts if (found := picture_axes(shape, layout)) is not None)
    variance = laplacian(v_hat, axes) + f32(SQUARES_OF_LAPLACIAN) * v_hat
    # E |x| of a normal variable is √(2/π) σ.
    usual = jnp.sqrt(jnp.maximum(variance, f32(0))) * f32(math.sqrt(2 / math.pi))
    mean = accurate_mean(usual, [axis for axis in range(len(shape)) if like.shape[axis] == 1])
    return EdgeHistory(jnp.asarray(age, jnp.int32), mean * f32(weight_seen(EDGE_DECAY, age)))


def of_the_array(edges: EdgeHistory, age: int, exp_avg_sq: StoredMoment, beta2: float) -> Any:
    """The history as it would be with the array's age; bit for bit where it has that age."""
    if (own_age := int(edges.age)) == age:
        return edges.history
    if own_age == 0:
        return estimated(v_hat_of(exp_avg_sq, beta2, age), edges.history, age).history
    return edges.history * f32(weight_seen(EDGE_DECAY, age) / weight_seen(EDGE_DECAY, own_age))


def v_hat_of(exp_avg_sq: StoredMoment, beta2: float, age: int) -> jax.Array:
    """v̂ of an array that took `age` steps, element by element."""
    values = {part: read_root(x) for part, x in tensors_of(exp_avg_sq, "exp_avg_sq").items()}
    v: jax.Array = elements(values, "exp_avg_sq")
    return v / f32(weight_seen(beta2, age))
