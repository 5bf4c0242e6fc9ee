"""The optimizer and the comparison that the tests of JAX libraries share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_optax import automagic_8bit, quantize_state

STEPS = 7
SAVED_AT = (2, 5)
"""In the mask's warm-up and behind it."""

FIELDS: dict[str, Any] = {"max_lr": 1e-1, "warmup_steps": 4, "min_8bit_size": 64, "torque_decay": 0.5}

OPTIMIZERS = {
    "automagic_8bit": lambda: optax.chain(optax.clip_by_global_norm(1.0), automagic_8bit(1e-3, **FIELDS)),
    "quantize_state": lambda: quantize_state(optax.adamw(1e-3), min_8bit_size=64),
}


def batch(step: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(step).standard_normal((8, 16)), jnp.float32)


def loss(prediction: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(prediction - x[:, ::-1]))


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Both trees have the same structure, dtypes and bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def has_codes(opt_state: Any) -> bool:
    return any(leaf.dtype == np.uint8 and leaf.size >= 64 for leaf in jax.tree.leaves(opt_state))
