"""Off the CPU a skipped array is selected instead of branched to: the same bits."""

import jax
import jax.numpy as jnp
import numpy as np

from automagic_optax import automagic_8bit


def _run():
    params = {"a": jnp.linspace(-1, 1, 64 * 80).reshape(64, 80), "b": jnp.full((7,), -0.0), "c": jnp.ones((5, 4))}
    tx = automagic_8bit(1e-3, warmup_steps=4, min_8bit_size=1024, torque_decay=0.5)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(5):
        grads = jax.tree.map(lambda p, step=step: jax.random.normal(jax.random.key(step), p.shape), params)
        if step in (1, 3):
            grads["ab"[step // 2]] = grads["ab"[step // 2]].at[0].set(jnp.nan)
        updates, state = update(grads, state, params)
    return updates, state


def test_selection_gives_what_branching_gives(monkeypatch):
    branched = _run()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    selected = _run()
    assert int(branched[1][0].skipped_steps["a"]) == 1
    for a, b in zip(jax.tree.leaves(branched), jax.tree.leaves(selected), strict=True):
        if a.dtype == jnp.float32:
            # Another fusion of the same arithmetic: a few roundings apart.
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-9)
        elif a.dtype == jnp.uint8 and a.size > 100:
            assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3
        else:
            np.testing.assert_array_equal(a, b)
