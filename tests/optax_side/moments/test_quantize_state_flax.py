"""`quantize_state` in `nnx.Optimizer` and in a `TrainState`, saved and restored."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

from automagic_optax import memory_report, quantize_state
from tests.optax_side.small import assert_nearly_same, assert_same_bits, grads, params, quantized_leaves

pytestmark = pytest.mark.compiled_quickly
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 20, 64))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(20, 64, rngs=rngs)
        self.hidden = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.hidden(self.embed(x)))[:, :5]


def loss(model: Model) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(TOKENS), TOKENS % 5).mean()


def test_nnx_optimizer_trains_as_the_plain_loop_and_traces_once() -> None:
    # z of schedule-free begins as a Variable's value, exp_avg_sq is a root, the embedding is too small.
    tx = quantize_state(optax.contrib.schedule_free_adamw(1e-2))
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    structure = jax.tree.structure(optimizer.opt_state)
    traces = 0

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer) -> jax.Array:
        nonlocal traces
        traces += 1
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    graph, weights = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    weights = nnx.as_pure(weights)
    state = tx.init(weights)

    @jax.jit
    def plain_step(weights: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(lambda w: loss(nnx.merge(graph, w)))(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    first = float(step(model, optimizer))
    for _ in range(20):
        last = float(step(model, optimizer))
    for _ in range(21):
        weights, state = plain_step(weights, state)
    assert traces == 1
    assert last < 0.5 * first
    assert jax.tree.structure(optimizer.opt_state) == structure
    # Two compiled programs, over 21 steps: float32 rounding, and now and then a code that is rounded otherwise.
    assert_nearly_same(nnx.as_pure(nnx.state(model, nnx.Param)), weights, 1e-3)
    (moment,) = quantized_leaves(nnx.as_pure(optimizer.opt_state))
    assert moment.shape == (64, 64)
    report = memory_report(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert (report["8bit_parameters"], report["total_parameters"]) == (64 * 64, 64 * 64 + 64 + 20 * 64)
    assert report["state_bytes"] == sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.slow
def test_a_state_of_variables_outside_of_an_optimizer() -> None:
    weights = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    tx, plain = quantize_state(optax.adam(1e-2)), quantize_state(optax.adam(1e-2))
    gradient = jax.tree.map(lambda w: 0.1 * w, weights)
    updates, state = jax.jit(tx.update)(gradient, tx.init(weights), weights)
    pure_updates, pure_state = jax.jit(plain.update)(
        nnx.as_pure(gradient), plain.init(nnx.as_pure(weights)), nnx.as_pure(weights)
    )
    assert jax.tree.structure(updates) == jax.tree.structure(weights)
    assert_same_bits(nnx.as_pure(updates), pure_updates)
    assert_same_bits(nnx.as_pure(state), pure_state)


def test_a_train_state_is_restored_bit_for_bit() -> None:
    tx = quantize_state(optax.adamw(1e-2))
    step = jax.jit(lambda state, gradient: state.apply_gradients(grads=gradient))

    def create() -> TrainState:
        return TrainState.create(apply_fn=None, params=params(), tx=tx)

    state = step(step(create(), grads(0)), grads(1))
    saved = serialization.to_bytes(state)
    restored = jax.tree.map(jnp.asarray, serialization.from_bytes(create(), saved))
    assert_same_bits(restored, state)
    assert serialization.to_bytes(restored) == saved
    assert len(quantized_leaves(restored.opt_state)) == 2
    assert_same_bits(step(restored, grads(2)), step(state, grads(2)))
