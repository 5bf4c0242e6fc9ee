"""From Adam in optax to this optimizer, and between its own forms."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from automagic_core import Config
from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_optax import automagic_8bit, from_adam_state, quantize_state, requantized
from automagic_optax.codec.stored import read_nonnegative, read_signed
from automagic_optax.moments.quantized_moment import QuantizedMoment
from tests.optax_side.small import assert_same_bits, find_state, quantized_leaves

pytestmark = pytest.mark.compiled_quickly
BARE: dict[str, Any] = {"edge_suppression": False, "frequency_penalty": 0.0, "lora_rank_penalty": False}
FIELDS: dict[str, Any] = {"warmup_steps": 0, "weight_decay": 0.0, "min_8bit_size": 256, **BARE}


class Run:
    """A classifier of noisy labels from a fixed teacher."""

    def __init__(self, inputs: int = 32, outputs: int = 48) -> None:
        rng = np.random.default_rng(0)
        self.teacher = jnp.asarray(rng.standard_normal((inputs, outputs)), jnp.float32)
        self.params = {
            "first": jnp.asarray(rng.standard_normal((inputs, outputs)) / 6, jnp.float32),
            "bias": jnp.zeros(outputs),
        }

        def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            logits = x @ params["first"] + params["bias"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        self._gradient = jax.jit(jax.grad(loss))

    def gradients(self, params: Any, t: int) -> Any:
        rng = np.random.default_rng(100 + t)
        inputs, outputs = self.teacher.shape
        x = jnp.asarray(rng.standard_normal((32, inputs)), jnp.float32)
        y = jnp.argmax(x @ self.teacher + 3 * jnp.asarray(rng.standard_normal((32, outputs))), axis=1)
        return self._gradient(params, x, y)


def structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


@functools.cache
def adam_run(steps: int) -> tuple[Run, Any, Any, float]:
    """The run, its parameters, Adam's state inside a chain, and the norm of the last update."""
    run = Run()
    tx = optax.chain(optax.clip_by_global_norm(1e3), optax.adamw(1e-3, b1=0.8, b2=0.95, weight_decay=0.0))
    params, state, update = run.params, tx.init(run.params), jax.jit(tx.update)
    updates = params
    for t in range(steps):
        updates, state = update(run.gradients(params, t), state, params)
        params = optax.apply_updates(params, updates)
    return run, params, state, float(optax.global_norm(updates))


ADAM: dict[str, Any] = {"b1": 0.8, "b2": 0.95}


def test_strict_promotion_of_types() -> None:
    _, params, adam, _ = adam_run(7)
    rows, whole = (automagic_8bit(1e-3, **FIELDS, factored=factored) for factored in ("second_moment", "none"))

    def moved() -> Any:
        state = from_adam_state(adam, params, rows, **ADAM)[0]
        return state, requantized(requantized(state, params, whole)[0], params, rows)[0]

    expected = moved()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert_same_bits(moved(), expected)


def test_every_state_is_what_adams_moments_say() -> None:
    _, params, adam, _ = adam_run(7)
    fields = {**FIELDS, "warmup_steps": 3, "factored": "none", "optim_bits": 32, "update_clip": 0.5}
    tx = automagic_8bit(1e-3, **fields)
    opt_state, _ = from_adam_state(adam, params, tx, **ADAM, config=Config(**fields), restart_warmup=False)
    state, moments = find_state(opt_state), adam[1][0]
    assert (int(state.step), float(state.log_rate_scale)) == (7, 0.0)
    # float32 against float64: a few rounding errors.
    close: Callable[..., None] = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)  # noqa: E731
    clipped = False
    for name in params:
        m_hat = np.asarray(moments.mu[name], np.float64) / (1 - 0.8**7)
        v_hat = np.asarray(moments.nu[name], np.float64) / (1 - 0.95**7)
        u = np.clip(m_hat / (np.sqrt(v_hat) + 1e-8), -0.5, 0.5)
        clipped |= bool((np.abs(u) == 0.5).any())
        close(state.exp_avg[name], u * (1 - 0.9**7))
        close(state.exp_avg_sq[name], v_hat * (1 - 0.99**7))
        close((state.exp_avg_res[name] + 0.001) / (1.001 - 0.999**7), np.ones(u.shape))
        close(state.background_scale[name], np.sqrt(v_hat).mean())
        assert (int(state.age[name]), float(state.torque_mean[name])) == (7, 1.0)
    assert clipped
    restarted, _ = from_adam_state(adam, params, tx, **ADAM)
    assert int(find_state(restarted).step) == 0
    assert int(find_state(restarted).age["bias"]) == 7
    assert structure(restarted) == structure(tx.init(params))


@pytest.mark.parametrize(
    ("factored", "bits"),
    [
        ("none", 8),
        ("second_moment", 8),
        pytest.param("all", 8, marks=pytest.mark.slow),
        pytest.param("second_moment", 32, marks=pytest.mark.slow),
    ],
)
def test_the_first_step_is_no_longer_than_adams_last(factored: Any, bits: Any) -> None:
    run, params, adam, last = adam_run(60)
    fields = {**FIELDS, "factored": factored, "optim_bits": bits}
    tx = automagic_8bit(1e-3, **fields)
    state, _ = from_adam_state(adam, params, tx, **ADAM, config=Config(**fields), restart_warmup=False)
    assert len(quantized_leaves(state)) == {"none": 3, "second_moment": 2, "all": 2}[factored] * (bits == 8)
    updates, state = tx.update(run.gradients(params, 60), state, params)
    # And no stand-still either: torque lets about half of the elements move at the first step.
    assert 0.5 * last < float(optax.global_norm(updates)) <= last
    assert int(find_state(state).age["first"]) == 61


def test_adams_moments_may_have_8_bits() -> None:
    run, params, _, _ = adam_run(60)
    adam = quantize_state(optax.adam(1e-3, **ADAM), min_8bit_size=256)
    state = adam.init(params)
    _, state = adam.update(run.gradients(params, 0), state, params)
    assert quantized_leaves(state)
    read = jax.tree.map(lambda x: x.read() if is_stored(x) else x, state.inner_state, is_leaf=is_stored)
    tx = automagic_8bit(1e-3, **FIELDS)
    assert_same_bits(from_adam_state(state, params, tx, **ADAM), from_adam_state(read, params, tx, **ADAM))


def is_stored(x: Any) -> bool:
    return isinstance(x, QuantizedMoment)


def test_factored_statistics_are_row_and_column_means() -> None:
    _, params, adam, _ = adam_run(3)
    state, told = from_adam_state(
        adam,
        params,
        automagic_8bit(1e-3, **{**FIELDS, "edge_suppression": True, "spatial_scope": "all", "optim_bits": 32}),
        **ADAM,
    )
    v = adam[1][0].nu["first"] / (1 - 0.95**3) * (1 - 0.99**3)
    found = find_state(state).exp_avg_sq["first"]
    np.testing.assert_allclose(found.row, v.mean(0, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(found.column, v.mean(1, keepdims=True), rtol=1e-5)
    assert "edge_history is estimated from the second moments (first)" in told


@pytest.mark.slow
def test_in_nnx(caplog: pytest.LogCaptureFixture) -> None:
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(lambda m: (m(jnp.ones((2, 64))) ** 2).mean())(model))

    old = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    step(model, old)
    tx = automagic_8bit(1e-3, **BARE)
    with caplog.at_level(logging.INFO, "automagic_optax"):
        state, told = from_adam_state(old.opt_state, nnx.state(model, nnx.Param), tx)
    assert told == [record.message for record in caplog.records]
    new = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.update(new.opt_state, nnx.state(state))
    step(model, new)
    found = find_state(nnx.as_pure(new.opt_state))
    assert int(jax.tree.leaves(found.age)[0]) == 2
    assert len(quantized_leaves(found)) == 2


# Narrow, where the row statistic has codes, and not, where the residual has.
@pytest.mark.parametrize("shape", [pytest.param((32, 48), marks=pytest.mark.slow), (72, 80)])
def test_to_8_bits_and_back_in_a_chain(shape: tuple[int, int]) -> None:
    run = Run(*shape)
    fields = {**FIELDS, "warmup_steps": 9, "torque_decay": 0.5, "max_lr": 0.1, "edge_suppression": True}

    def chain(**changed: Any) -> Any:
        return optax.chain(automagic_8bit(1e-3, **{**fields, **changed}), optax.trace(0.5))

    wide = chain(optim_bits=32)
    state, update = wide.init(run.params), jax.jit(wide.update)
    for t in range(4):
        _, state = update(run.gradients(run.params, t), state, run.params)
    assert float(find_state(state).log_rate_scale) > np.log(1e-5 / 1e-3)
    eight, told = requantized(state, run.params, chain())
    assert told == ["32-bit states are rounded to 8 bits (first)"]
    assert structure(eight) == structure(chain().init(run.params))
    back, _ = requantized(eight, run.params, wide)
    assert structure(back) == structure(state)
    ours, theirs = find_state(back), find_state(state)
    assert any(np.asarray(walk).any() for walk in theirs.walk.values())
    for field in ("step", *SEARCH_SCALARS, "walk", "age", "skipped_steps", "spatial_variance"):
        assert_same_bits(getattr(ours, field), getattr(theirs, field))
    for field in ("exp_avg", "exp_avg_sq", "exp_avg_res", "s"):
        pairs = zip(jax.tree.leaves(getattr(ours, field)), jax.tree.leaves(getattr(theirs, field)), strict=True)
        # One code's width, relative to the largest: 2 / 127, squares twice that.
        assert all(float(jnp.abs(a - b).max() / jnp.abs(b).max()) < 0.032 for a, b in pairs), field
    # Stages and the momentum behind: as they were.
    assert_same_bits([back[0][1:2], back[1]], [state[0][1:2], state[1]])
    assert_same_bits(requantized(eight, run.params, chain())[0], eight)

    single, told = requantized(eight, run.params, chain(factored="none", edge_suppression=False, block_size=64))
    for word in ("approximated by the product", "SuppressEdgesState is dropped", "blocks of 64"):
        assert any(word in sentence for sentence in told), word
    moment = find_state(eight).exp_avg_sq["first"]
    row, column = (jnp.asarray(x) for x in read_nonnegative(moment))
    expected = row / row.mean() * column
    found: Any = read_nonnegative(find_state(single).exp_avg_sq["first"])
    # √v is one of 255 codes: two widths of 1 / 127 at most at the largest.
    np.testing.assert_allclose(jnp.sqrt(found), jnp.sqrt(expected), atol=0.016 * float(jnp.sqrt(expected).max()))
    scale = jnp.sqrt(expected / (1 - 0.99**4)).mean()
    np.testing.assert_allclose(find_state(single).background_scale["first"], scale, rtol=1e-5)
    assert read_signed(find_state(single).exp_avg["first"]).shape == shape
    updates, _ = chain(factored="none", edge_suppression=False, block_size=64).update(
        run.gradients(run.params, 4), single, run.params
    )
    assert bool(jnp.isfinite(optax.global_norm(updates)))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: s[1][0]._replace(mu={**s[1][0].mu, "bias": jnp.zeros(3)}), r"\(3,\) for bias of shape \(48,\)"),
        (lambda s: s[1][0]._replace(nu={"first": s[1][0].nu["first"]}), "nu has other arrays"),
        (lambda s: s[1][0]._replace(nu=jax.tree.map(jnp.negative, s[1][0].nu)), "negative second moments"),
        (lambda s: s[1][0]._replace(count=jnp.zeros([], jnp.int32)), "took no step"),
        (lambda s: (s, s), "expected one ScaleByAdamState in the optimizer state, found 2"),
        (lambda s: optax.EmptyState(), "found 0"),
    ],
)
def test_what_does_not_fit_is_refused(break_it: Callable[[Any], Any], message: str) -> None:
    run = Run()
    tx = optax.chain(optax.clip_by_global_norm(1e3), optax.adamw(1e-3))
    _, adam = tx.update(run.gradients(run.params, 0), tx.init(run.params), run.params)
    with pytest.raises(ValueError, match=message):
        from_adam_state(break_it(adam), run.params, automagic_8bit(1e-3, **BARE))


def test_requantized_refuses_other_arrays_and_other_rows() -> None:
    run = Run()
    tx = automagic_8bit(1e-3, **BARE)
    state = tx.init(run.params)
    with pytest.raises(ValueError, match=r"shape \(48,\) for bias of shape \(3,\)"):
        requantized(state, {**run.params, "bias": jnp.zeros(3)}, tx)
    with pytest.raises(ValueError, match="rows of shape"):
        requantized(state, run.params, automagic_8bit(1e-3, layout="torch", **BARE))
