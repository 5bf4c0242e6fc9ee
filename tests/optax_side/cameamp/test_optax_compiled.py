"""jit, scan, donated buffers and recompilation."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_optax import automagic_8bit, scale_by_cameamp
from tests.optax_side.small import assert_nearly_same, assert_same_bits, find_state, grads, params, quantized_leaves

pytestmark = pytest.mark.compiled_quickly
TX = automagic_8bit(1e-4, warmup_steps=4, weight_decay=0.1)
update = jax.jit(TX.update)


def step(weights, state, gradient):
    updates, state = update(gradient, state, weights)
    return optax.apply_updates(weights, updates), state


def loop(steps: int) -> tuple:
    weights, state = params(), TX.init(params())
    for t in range(steps):
        weights, state = step(weights, state, grads(t))
    return weights, state


def test_it_is_a_gradient_transformation_with_extra_args() -> None:
    assert isinstance(TX, optax.GradientTransformationExtraArgs)
    assert isinstance(scale_by_cameamp(1e-4), optax.GradientTransformationExtraArgs)
    weights = params()
    plain = update(grads(), TX.init(weights), weights)
    extra = update(grads(), TX.init(weights), weights, value=1.0, key=jax.random.key(0), unknown=None)
    assert_same_bits(extra, plain)


def test_init_under_jit() -> None:
    state = jax.jit(TX.init)(params())
    assert_same_bits(state, TX.init(params()))
    cameamp = find_state(state)
    assert int(cameamp.step) == 0
    assert len(quantized_leaves(state)) == 2  # exp_avg and exp_avg_res of the kernel; exp_avg_sq is factored
    assert all(not np.asarray(x).any() for q in quantized_leaves(state) for x in (q.codes, q.absmax))
    assert jax.tree.leaves(cameamp.torque_mean) == [1.0] * 4
    shapes = jax.eval_shape(TX.init, params())
    assert jax.tree.structure(shapes) == jax.tree.structure(state)


def test_update_does_not_recompile_and_keeps_shapes_and_dtypes() -> None:
    update.clear_cache()
    weights = params()
    first = TX.init(weights)
    updates, state = update(grads(0), first, weights)
    for t in range(1, 8):  # past the warm-up's end
        updates, state = update(grads(t), state, weights)
    assert update._cache_size() == 1
    describe = partial(jax.tree.map, lambda x: (x.shape, x.dtype, x.weak_type))
    assert describe(state) == describe(first)
    assert describe(updates) == describe(weights)
    assert int(find_state(state).step) == 8


def test_steps_compiled_and_operation_by_operation() -> None:
    weights, state = params(), TX.init(params())
    for t in range(3):
        updates, state = TX.update(grads(t), state, weights)
        weights = optax.apply_updates(weights, updates)
    # Fused sums round differently by a few 1e-7, and so may a random rounding of a code now and then.
    assert_nearly_same(weights, loop(3)[0])


def test_scan_is_the_loop() -> None:
    every = [grads(t) for t in range(6)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *every)

    @jax.jit
    def run(weights, state):
        return jax.lax.scan(lambda carry, g: (step(*carry, g), None), (weights, state), stacked)[0]

    weights, state = run(params(), TX.init(params()))
    expected_weights, expected_state = loop(6)
    # The same program inside a loop may be fused otherwise: float32 rounding.
    assert_nearly_same(weights, expected_weights)
    assert find_state(state).step == find_state(expected_state).step == 6


def states_told(tree: Any) -> list[jax.Array]:
    """The `energy_removed` of each stage and the rate in force; no array here has an `effective_rank`."""
    states = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "energy_removed") or hasattr(x, "log_rate_scale"))
    told = [getattr(x, "energy_removed", getattr(x, "learning_rate", None)) for x in states]
    return [x for x in told if x is not None]


def test_donated_buffers_are_reused() -> None:
    donating = jax.jit(
        lambda weights, state, gradient: step(weights, state, gradient),
        donate_argnums=(0, 1),
    )
    weights, state = jax.tree.map(jnp.copy, params()), TX.init(params())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # jax warns about a donated buffer that it could not use
        for t in range(6):
            last = (weights, state)
            weights, state = donating(weights, state, grads(t))
            # What a state has only to tell is never read, so it is no argument of the program.
            told = states_told(last)
            assert all(x.is_deleted() for x in jax.tree.leaves(last) if not any(x is y for y in told))
            assert len(told) == 4
    assert donating._cache_size() == 1
    assert_nearly_same(weights, loop(6)[0])


def test_a_schedule_is_called_with_the_count_of_earlier_steps() -> None:
    rates = [1e-4, 2e-4, 0.0, 5e-5]

    def schedule(count):
        return jnp.asarray(rates)[count]

    scheduled = automagic_8bit(schedule, warmup_steps=0, search_gain=0.0)
    update = jax.jit(scheduled.update)
    weights, state = params(), scheduled.init(params())
    for t, rate in enumerate(rates):
        updates, new_state = update(grads(t), state, weights)
        if rate == 0:
            assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))
        else:
            constant = automagic_8bit(rate, warmup_steps=0, search_gain=0.0)
            assert_nearly_same(updates, constant.update(grads(t), state, weights)[0])
        weights, state = optax.apply_updates(weights, updates), new_state


def test_the_step_counter_saturates() -> None:
    def counts(x) -> bool:
        return hasattr(x, "_fields") and "step" in x._fields

    last = jnp.int32(2**31 - 1)
    weights = params()
    state = jax.tree.map(lambda x: x._replace(step=last) if counts(x) else x, TX.init(weights), is_leaf=counts)
    cameamp = find_state(state)
    old = cameamp._replace(age=jax.tree.map(lambda _: last, cameamp.age))
    state = jax.tree.map(lambda x: old if x is cameamp else x, state, is_leaf=counts)
    _, state = step(weights, state, grads())
    steps = [int(x.step) for x in jax.tree.leaves(state, is_leaf=counts) if counts(x)]
    assert set(steps) == {2**31 - 1}
    assert len(steps) >= 2
    assert all(int(age) == 2**31 - 1 for age in jax.tree.leaves(find_state(state).age))


@pytest.mark.parametrize("rate", [1e-4, np.float32(1e-4), jnp.float32(1e-4)])
def test_learning_rates_of_every_kind(rate) -> None:
    def traced(lr):
        tx = automagic_8bit(lr, warmup_steps=0)
        return tx.update(grads(), tx.init(params()), params())[0]

    assert_nearly_same(jax.jit(traced)(jnp.float32(1e-4)), traced(rate))
