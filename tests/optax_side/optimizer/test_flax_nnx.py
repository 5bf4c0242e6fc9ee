"""flax.nnx: `nnx.Optimizer` on a small real model gives what the plain optax loop gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from automagic_optax import automagic_8bit, finish_warmup, memory_report
from tests.optax_side.small import assert_nearly_same, find_state

pytestmark = pytest.mark.compiled_quickly


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(20, 64, rngs=rngs)
        self.hidden = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.hidden(self.embed(x)))[:, :5]


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 20, 64))
LABELS = TOKENS % 5


def loss(model: Model) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(TOKENS), LABELS).mean()


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer) -> jax.Array:
    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def pure(model: Model) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.slow
def test_training_is_the_plain_loops_and_continues_after_the_warmup() -> None:
    # 8-bit states of both maps, row and column statistics, packed signs, and arrays without some of them.
    # Four steps are too few for a search.
    fields = {"search_gain": 0.0, "lr_mask_gain": 0.1, "torque_decay": 0.5}
    tx = automagic_8bit(1e-2, warmup_steps=4, max_lr=0.1, min_8bit_size=1024, **fields)
    model = Model(nnx.Rngs(0))
    graph, _ = nnx.split(model, nnx.Param)

    @jax.jit
    def plain_step(params: Any, state: Any) -> tuple[Any, Any]:
        grads = nnx.to_pure_dict(jax.grad(lambda p: loss(nnx.merge(graph, p)))(params_state(params)))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def params_state(params: Any) -> nnx.State:
        template = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(template, params)
        return template

    params = jax.tree.map(jnp.copy, pure(model))
    state = tx.init(params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    first = float(loss(model))
    for t in range(1, 9):
        if t == 6:
            before = memory_report(optimizer.opt_state)
            optimizer.opt_state = finish_warmup(optimizer.opt_state)
            after = memory_report(optimizer.opt_state)
            assert after["state_bytes"] < before["state_bytes"]
        step(model, optimizer)
        params, state = plain_step(params, state)
        # Two compiled programs: float32 rounding, and now and then a code that is rounded otherwise.
        assert_nearly_same(pure(model), params, 1e-4)
        # The plain loop keeps its warm-up states, which nothing reads any more.
        ours = memory_report(optimizer.opt_state)
        assert ours == memory_report(finish_warmup(state) if t >= 6 else state)
        assert ours["total_parameters"] == count
        assert ours["8bit_parameters"] == 64 * 64 + 20 * 64
    for _ in range(30):
        last = float(step(model, optimizer))
    assert last < 0.5 * first


def test_a_subset_of_the_parameters() -> None:
    model = Model(nnx.Rngs(0))
    wrt = nnx.All(nnx.Param, nnx.PathContains("hidden"))
    optimizer = nnx.Optimizer(model, automagic_8bit(1e-3), wrt=wrt)
    assert memory_report(optimizer.opt_state)["total_parameters"] == 64 * 64 + 64
    frozen = pure(model)["embed"]["embedding"]

    @nnx.jit
    def partial_step(model: Model, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model))

    trained = pure(model)["hidden"]["kernel"]
    for _ in range(2):
        partial_step(model, optimizer)
    assert (pure(model)["hidden"]["kernel"] != trained).any()
    assert (pure(model)["embed"]["embedding"] == frozen).all()


class Adapted(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(20, 64, rngs=rngs)
        self.hidden = nnx.LoRA(64, 16, 64, base_module=nnx.Linear(64, 64, rngs=rngs), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.hidden(self.embed(x)))[:, :5]


@pytest.mark.slow  # test_optax_compiled counts in optax
def test_a_step_is_traced_once_and_once_more_after_the_warmup() -> None:
    # 8-bit states, row and column statistics, s and signs, adapters; without the stages that keep nothing.
    off: dict[str, Any] = {"edge_suppression": False, "frequency_penalty": 0.0}
    tx = automagic_8bit(1e-3, **off, warmup_steps=4, min_8bit_size=1024, torque_decay=0.5, percentile_clipping=95)
    model = Adapted(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = 0

    @nnx.jit
    def counted(model: Adapted, optimizer: nnx.Optimizer) -> None:
        nonlocal traces
        traces += 1
        optimizer.update(model, nnx.grad(loss)(model))

    structure = jax.tree.structure(optimizer.opt_state)
    for _ in range(4):
        counted(model, optimizer)
        assert traces == 1
        assert jax.tree.structure(optimizer.opt_state) == structure
    report = memory_report(optimizer.opt_state)
    assert report["8bit_parameters"] == 20 * 64 + 64 * 64 + 2 * 64 * 16
    optimizer.opt_state = finish_warmup(optimizer.opt_state)
    for _ in range(3):
        counted(model, optimizer)
        assert traces == 2
    assert int(jax.tree.leaves(find_state(optimizer.opt_state).step)[0]) == 7
