"""`quantize_state` inside and around other transformations, compiled, with parameters of every kind."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_optax import QuantizedMoment, automagic_8bit, memory_report, quantize_state
from tests.optax_side.small import assert_nearly_same, assert_same_bits, grads, params, quantized_leaves, train

pytestmark = pytest.mark.compiled_quickly
ADAM = quantize_state(optax.adam(1e-2))
MASK = {"dense": {"kernel": True, "bias": False}, "table": True, "scale": False}
LABELS = {"dense": {"kernel": "a", "bias": "b"}, "table": "a", "scale": "b"}


def only(tree: Any) -> Any:
    return {"dense": {"kernel": tree["dense"]["kernel"]}, "table": tree["table"]}


# Each pair is the same optimizer, with 8 bits inside a wrapper and around it.
PAIRS: dict[str, tuple[Any, Any]] = {
    "chain": (
        optax.chain(optax.clip_by_global_norm(1.0), quantize_state(optax.scale_by_adam()), optax.scale(-0.01)),
        quantize_state(optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale(-0.01))),
    ),
    "masked": (optax.masked(ADAM, MASK), quantize_state(optax.masked(optax.adam(1e-2), MASK))),
    "partition": (
        optax.partition({"a": ADAM, "b": optax.sgd(0.1)}, LABELS),
        quantize_state(optax.partition({"a": optax.adam(1e-2), "b": optax.sgd(0.1)}, LABELS)),
    ),
    "inject_hyperparams": (
        optax.inject_hyperparams(lambda learning_rate: quantize_state(optax.adam(learning_rate)))(1e-2),
        quantize_state(optax.inject_hyperparams(optax.adam)(1e-2)),
    ),
    "apply_if_finite": (
        optax.apply_if_finite(ADAM, 5),
        quantize_state(optax.apply_if_finite(optax.adam(1e-2), 5)),
    ),
    "MultiSteps of one step": (
        optax.MultiSteps(ADAM, 1).gradient_transformation(),
        ADAM,
    ),
    "a part of its own inside": (
        quantize_state(optax.chain(quantize_state(optax.scale_by_adam()), optax.scale(-0.01))),
        ADAM,
    ),
}


FAST = ("partition", "inject_hyperparams")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in PAIRS])
def test_inside_a_wrapper_and_around_it(name: str) -> None:
    (inside, inner), (around, outer) = (train(tx, 3) for tx in PAIRS[name])
    # Two programs: a float32 rounding here and there, and so now and then another code, which is at most 1/64 of three
    # steps of 0.01 beside weights of 3 to 4.
    assert_nearly_same(inside, around, 1.5e-4)
    assert len(quantized_leaves(inner)) == len(quantized_leaves(outer)) == 2
    if name in ("masked", "partition"):
        alone, _ = train_part()
        assert_nearly_same(only(inside), alone, 1.5e-4)


def train_part() -> Any:
    weights = only(params())
    state, update = ADAM.init(weights), jax.jit(ADAM.update)
    for step in range(3):
        updates, state = update(only(grads(step)), state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, state


def test_compiled_it_is_the_same_and_compiles_once() -> None:
    tx = quantize_state(optax.adamw(1e-2))
    update = jax.jit(tx.update)
    weights, state = params(), tx.init(params())
    describe = partial(jax.tree.map, lambda x: (x.shape, x.dtype, x.weak_type))
    first = describe(state)
    for t in range(3):
        step_by_step = tx.update(grads(t), state, weights)
        updates, state = update(grads(t), state, weights)
        # Fused sums round differently by some 1e-7, and so may a random rounding of a code now and then.
        assert_nearly_same(updates, step_by_step[0], 1e-5)
        assert_nearly_same(state, step_by_step[1], 1e-5)
        assert describe(state) == first
    assert update._cache_size() == 1
    assert_same_bits(jax.jit(tx.init)(weights), tx.init(weights))


def test_under_vmap_and_with_donated_buffers() -> None:
    tx = quantize_state(optax.lion(1e-2))

    def step(carry: Any, gradient: Any) -> tuple[Any, None]:
        weights, state = carry
        updates, state = tx.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    two = jax.tree.map(lambda x: jnp.stack([x, -x]), params())
    states = jax.vmap(tx.init)(two)
    (_, states), _ = jax.jit(jax.vmap(step))((two, states), jax.tree.map(lambda x: jnp.stack([x, 2 * x]), grads()))
    (kernel,) = quantized_leaves(states)
    (alone,) = quantized_leaves(train(tx, 1)[1])
    assert_nearly_same(jax.tree.map(lambda x: x[0], kernel), alone)

    donating = jax.jit(lambda carry, gradient: step(carry, gradient)[0], donate_argnums=0)
    carry = jax.tree.map(jnp.copy, (params(), tx.init(params())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # jax warns about a donated buffer that it could not use
        last, carry = carry, donating(carry, grads(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(last))
    assert_nearly_same(carry, train(tx, 1), 1e-6)


@pytest.mark.slow
def test_scan_is_the_loop() -> None:
    tx = quantize_state(optax.lion(1e-2))
    every = jax.tree.map(lambda *x: jnp.stack(x), *[grads(t) for t in range(3)])

    def step(carry: Any, gradient: Any) -> tuple[Any, None]:
        weights, state = carry
        updates, state = tx.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    scanned = jax.jit(lambda carry: jax.lax.scan(step, carry, every)[0])((params(), tx.init(params())))
    assert_nearly_same(scanned, train(tx, 3), 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_low_precision_keeps_its_dtypes(dtype: str) -> None:
    weights = jax.tree.map(lambda w: w.astype(dtype), params())
    plain = optax.scale_by_rms()
    tx = quantize_state(plain)
    state, plain_state = tx.init(weights), plain.init(weights)
    gradient = jax.tree.map(lambda g: g.astype(dtype), grads())
    updates, state = tx.update(gradient, state, weights)
    expected, plain_state = plain.update(gradient, plain_state, weights)
    assert_same_bits(updates, expected)
    (moment,) = quantized_leaves(state)
    assert moment.dtype == dtype
    value, exact = moment.read(), plain_state.nu["dense"]["kernel"]
    assert value.dtype == exact.dtype == dtype
    error = np.abs(np.asarray(value, np.float32) - np.asarray(exact, np.float32))
    # Codes of the largest decade lie 1/128 of the block's largest apart; squared twice as far, and the dtype's own ulp.
    assert (error <= 0.03 * np.asarray(exact, np.float32).max(axis=-1, keepdims=True)).all()


def test_parameters_of_every_kind() -> None:
    weights = {
        "none": None,
        "scalar": jnp.float32(2.0),
        "empty": [jnp.ones((0, 300)), jnp.ones((4, 0))],
        "integers": jnp.ones(5000, jnp.int32),
        "numpy": np.ones((16, 256), np.float32),
    }
    tx = quantize_state(optax.trace(0.9), min_8bit_size=1)
    state = tx.init(weights)
    assert len(quantized_leaves(state)) == 2  # the scalar's and the numpy array's
    update = jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(weights, state, weights)
    assert jax.tree.structure(updates) == jax.tree.structure(weights)
    assert float(updates["scalar"]) == pytest.approx(3.8, rel=1e-6)
    for nothing in ({}, [], None, {"none": None}):
        updates, state = tx.update(nothing, tx.init(nothing), nothing)
        assert jax.tree.leaves(updates) == []
    one = jnp.ones((64, 64))
    (moment,) = quantized_leaves(update(one, tx.init(one))[1])
    assert moment.shape == (64, 64)


def test_a_number_of_pythons_is_a_parameter() -> None:
    params = {"w": jnp.ones((16, 32)), "scale": 1.0}
    tx, plain = quantize_state(optax.adamw(1e-3), min_8bit_size=16), optax.adamw(1e-3)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(params, tx.init(params), params)
        wanted, _ = plain.update(params, plain.init(params), params)
        assert updates["scale"] == pytest.approx(float(wanted["scale"]), rel=1e-5)
    assert quantize_state(plain).update(1.0, quantize_state(plain).init(1.0), 1.0)[0] == pytest.approx(-1e-3, rel=1e-3)


def test_extra_arguments_reach_the_transformation() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, value: Any, how: str, **rest: Any) -> Any:
        assert (how, params) == ("text", None)
        return jax.tree.map(lambda u: u * value, updates), jax.tree.map(jnp.add, state, updates)

    tx = quantize_state(optax.GradientTransformationExtraArgs(lambda p: jax.tree.map(jnp.zeros_like, p), update))
    step = jax.jit(lambda g, s, v: tx.update(g, s, value=v, how="text"))
    updates, state = step(grads(), tx.init(params()), 3.0)
    assert_nearly_same(updates, jax.tree.map(lambda g: 3 * g, grads()))
    assert float(state.inner_state["scale"]) == float(grads()["scale"])


def test_map_params_finds_every_state() -> None:
    tx = quantize_state(optax.adam(1e-2))
    seen = []
    mapped = optax.tree.map_params(
        tx,
        lambda leaf: seen.append(leaf) or leaf,
        tx.init(params()),
        is_leaf=lambda x: isinstance(x, QuantizedMoment),
    )
    assert_same_bits(mapped, tx.init(params()))
    assert len(seen) == 8
    assert sum(isinstance(leaf, QuantizedMoment) for leaf in seen) == 2


def test_a_bad_gradient_inside_apply_if_finite_changes_no_bit() -> None:
    tx = optax.apply_if_finite(ADAM, 5)
    weights, state = train(tx, 2)
    bad = grads(2)
    bad["dense"]["kernel"] = bad["dense"]["kernel"].at[0, 0].set(jnp.nan)
    updates, after = jax.jit(tx.update)(bad, state, weights)
    assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))
    assert_same_bits(after.inner_state, state.inner_state)


def test_memory_report_counts_it() -> None:
    tx = optax.chain(optax.clip(1.0), quantize_state(optax.adam(1e-2)))
    _, state = train(tx, 1)
    report = memory_report(state, params())
    assert report["total_parameters"] == 4096 + 7 + 45 + 1
    assert report["8bit_parameters"] == 4096
    # Two states: a byte for each element of the kernel and 4 for each of its 16 blocks, 4 bytes for the others; two
    # counters, Adam's and ours.
    assert report["state_bytes"] == 2 * (4096 + 4 * 16 + 4 * 53) + 2 * 4
    assert report["adam_state_bytes"] == 8 * 4149
    ours = automagic_8bit(1e-4).init(params())
    assert memory_report(ours, params()) == memory_report(ours)
    with pytest.raises(ValueError, match="given the parameters"):
        memory_report(state)
