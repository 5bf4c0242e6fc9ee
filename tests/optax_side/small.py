"""A small parameter tree with one 8-bit array, and comparisons bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automagic_optax import QuantizedArray, ScaleByCameampState


def params(seed: int = 0) -> dict[str, Any]:
    """A dense layer of 4,096 weights (8-bit states), its bias, a table, and a scalar."""
    rng = np.random.default_rng(seed)
    shapes = {"dense": {"kernel": (16, 256), "bias": (7,)}, "table": (9, 5), "scale": ()}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def grads(step: int = 0) -> dict[str, Any]:
    """Gradients for `params`, different at every step, that mostly agree in sign."""
    return jax.tree.map(lambda drift, noise: 0.5 * drift + 0.1 * noise, params(100), params(200 + step))


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Both trees have the same structure, dtypes and bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    named = jax.tree_util.tree_leaves_with_path(ours)
    for (path, a), b in zip(named, jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def same_but_for_nans(ours: Any, theirs: Any) -> bool:
    """Whether two arrays have the same bits, but where both are NaN: a GPU gives NaNs bits of its own."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    same = (ours == theirs) & (np.signbit(ours) == np.signbit(theirs)) | (np.isnan(ours) & np.isnan(theirs))
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and bool(same.all())


def assert_nearly_same(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    """As `assert_same_bits`, but floats within a relative tolerance of each array's largest."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    named = jax.tree_util.tree_leaves_with_path(ours)
    for (path, a), b in zip(named, jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == np.uint8:
            assert (a != b).mean() < 0.01, path
        else:
            scale = max(float(np.abs(b).max(initial=0)), 1e-30)
            assert np.abs(a.astype(np.float64) - b).max(initial=0) <= tolerance * scale, path


def find_state(opt_state: Any) -> ScaleByCameampState:
    """The one `ScaleByCameampState` inside an optimizer state."""

    def is_state(x: Any) -> bool:
        return isinstance(x, ScaleByCameampState)

    (found,) = [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]
    return found


def quantized_leaves(tree: Any) -> list[QuantizedArray]:
    """Every 8-bit array in a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QuantizedArray))
    return [x for x in leaves if isinstance(x, QuantizedArray)]


def train(tx: Any, steps: int, weights: Any = None, update: Callable[..., Any] | None = None) -> tuple[Any, Any]:
    """Parameters and state after some compiled steps on `grads`."""
    weights = params() if weights is None else weights
    update = jax.jit(tx.update) if update is None else update
    state = tx.init(weights)
    for step in range(steps):
        gradient = jax.tree.map(lambda g, w: g.astype(w.dtype), grads(step), weights)
        updates, state = update(gradient, state, weights)
        weights = jax.tree.map(lambda w, u: (w + u).astype(w.dtype), weights, updates)
    return weights, state
