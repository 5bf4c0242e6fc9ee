"""Off the CPU a skipped array is selected instead of branched to: the same bits, alone and in batches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from automagic_optax import automagic_8bit
from tests.optax_side.small import assert_same_bits, find_state

# Alone: one with 8-bit states, one of negative zeros, one in 32 bits.  In batches: adapters, and vectors.
SHAPES = {"a": (64, 80), "b": (7,), "c": (5, 4), "d1": (40, 32), "d2": (40, 32), "d3": (40, 32), "e1": (3,), "e2": (3,)}
SPOILT = {1: "a", 2: "d2", 3: "b", 4: "e1"}


def _run() -> tuple[Any, Any]:
    params = {name: jnp.linspace(-1, 1, int(np.prod(shape))).reshape(shape) for name, shape in SHAPES.items()}
    params["b"] = jnp.full((7,), -0.0)
    tx = automagic_8bit(
        1e-3, warmup_steps=4, min_8bit_size=1024, torque_decay=0.5, lora=lambda path, leaf: leaf.shape == (40, 32)
    )
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(5):
        grads = {name: jax.random.normal(jax.random.key(step), shape) for name, shape in SHAPES.items()}
        if step in SPOILT:
            grads[SPOILT[step]] = grads[SPOILT[step]].at[0].set(jnp.nan)
        updates, state = update(grads, state, params)
    return updates, state


@pytest.mark.slow
def test_selection_gives_what_branching_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    branched = _run()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    selected = _run()
    skipped = {name: int(count) for name, count in find_state(selected[1]).skipped_steps.items()}
    assert skipped == {name: int(name in SPOILT.values()) for name in SHAPES}
    # Negative zeros, which leave a parameter of −0.0 as it is.
    assert_same_bits(selected[0]["e1"], jnp.full(3, -0.0))
    for a, b in zip(jax.tree.leaves(branched), jax.tree.leaves(selected), strict=True):
        if a.dtype == jnp.float32:
            # Another fusion of the same arithmetic: a few roundings apart, in an FFT of an array's largest number.
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-9 + 3e-7 * float(jnp.abs(b).max()))
        elif a.dtype == jnp.uint8 and a.size > 100:
            assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3
        else:
            np.testing.assert_array_equal(a, b)
