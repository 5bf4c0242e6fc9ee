"""Low-precision parameters move: a small transformer in bfloat16 ends where the float32 one does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_optax import automagic_8bit
from benchmarks import byte_transformer as model

SHAPE = model.Shape(layers=1, width=48, heads=4, context=32)
STEPS = 150


def train(lr: float, dtype: str, stochastic: bool = True, steps: int = STEPS) -> tuple[float, float]:
    """The mean loss of the last 20 steps, and the share of the parameters that the last step left as they were."""
    params = jax.tree.map(lambda x: x.astype(dtype), model.initial_params(jax.random.key(0), SHAPE))
    # Fixed rates: the search would raise the lowest one and blur what is compared.
    tx = automagic_8bit(lr, search_gain=0.0, warmup_steps=10, min_8bit_size=1024, stochastic_rounding_params=stochastic)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        as_float = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        loss, grads = jax.value_and_grad(functools.partial(model.loss, shape=SHAPE))(as_float, batch)
        updates, state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        still = sum(jnp.sum(a == b) for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True))
        return new, state, loss, still

    rng = np.random.default_rng(0)
    text = model.standard_library(300_000).train
    losses = []
    for _ in range(steps):
        batch = jnp.asarray(model.windows(text, 16, SHAPE.context, rng))
        params, state, loss, still = step(params, state, batch)
        losses.append(float(loss))
    return float(np.mean(losses[-20:])), int(still) / sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-5, 1e-4, 1e-3])
def test_bfloat16_ends_within_one_percent_of_float32(lr):
    full, _ = train(lr, "float32")
    half, _ = train(lr, "bfloat16")
    assert abs(half - full) <= 0.01 * full


@pytest.mark.slow
def test_rounded_to_nearest_most_updates_vanish():
    _, still = train(1e-5, "bfloat16", stochastic=False, steps=12)
    _, still_stochastic = train(1e-5, "bfloat16", stochastic=True, steps=12)
    assert still > 0.85
    assert still_stochastic < still


def test_what_nearest_loses_stochastic_rounding_keeps():
    # One array, 2,000 steps of one and the same direction: float32 moves by about 2,000 · lr.
    moved = {}
    for dtype, stochastic in (("float32", True), ("bfloat16", True), ("bfloat16", False)):
        tx = automagic_8bit(
            1e-5, search_gain=0.0, warmup_steps=0, weight_decay=0.0, stochastic_rounding_params=stochastic
        )
        start = jnp.full((64, 64), 0.02, dtype)

        def step(carry, _, tx=tx):
            params, state = carry
            updates, state = tx.update(jnp.ones((64, 64)), state, params)
            return (optax.apply_updates(params, updates), state), None

        (end, _), _ = jax.jit(lambda p, step=step, tx=tx: jax.lax.scan(step, (p, tx.init(p)), None, 2000))(start)
        moved[dtype, stochastic] = float(jnp.mean(end.astype(jnp.float32) - start.astype(jnp.float32)))
    exact = moved["float32", True]
    assert exact < -0.01
    # 4,096 elements, each with a random walk of about √(0.02 · ulp): its mean is within 1 %.
    assert moved["bfloat16", True] == pytest.approx(exact, rel=0.01)
    assert abs(moved["bfloat16", False]) < 0.5 * abs(exact)
