"""The rate search in JAX as users meet it: resumed in its midst, under MultiSteps, and where it rests."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_core import Config
from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_optax import automagic_8bit, finish_warmup, learning_rate
from automagic_optax.cameamp.learning_rate import Evidence, Rates, searched
from automagic_optax.cameamp.states import Search
from tests.optax_side.small import assert_same_bits, find_state, grads, params, train
from tests.oracle.rate_search import random_rises, rise_after_climb

pytestmark = pytest.mark.compiled_quickly
FIELDS: dict[str, Any] = {"warmup_steps": 16, "straightness": 0.8, "max_lr": 1e-2, "edge_suppression": False}
FIELDS |= {"frequency_penalty": 0.0, "lora_rank_penalty": False}
TX = automagic_8bit(1e-4, **FIELDS)
UPDATE = jax.jit(TX.update)
START = np.log(1e-5 / 1e-4)
CLIMBING, RISING = 5, 7
"""Numbers of steps before and after the end of the climb."""


def gradient(t: int) -> Any:
    """Those of steps 6 and 7 point the other way, which ends the climb for two steps more."""
    return jax.tree.map(jnp.negative, grads(t)) if t in (5, 6) else grads(t)


def go_on(state: Any, weights: Any, steps: range) -> tuple[Any, Any]:
    for t in steps:
        updates, state = UPDATE(gradient(t), state, weights)
        weights = optax.apply_updates(weights, updates)
    return state, weights


def search(state: Any) -> list[float]:
    return [float(getattr(find_state(state), name)) for name in SEARCH_SCALARS]


@pytest.mark.parametrize("steps", [CLIMBING, RISING])
def test_resumed_in_its_midst_it_finds_the_same(steps: int) -> None:
    half, weights = go_on(TX.init(params()), params(), range(steps))
    peak = search(half)[3]
    assert peak > 0.9 if steps == CLIMBING else peak < -0.9
    resumed = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, half)))
    whole, again = (go_on(state, weights, range(steps, 13)) for state in (half, resumed))
    assert search(whole[0])[0] > search(half)[0]
    assert search(whole[0])[3] > 0.9
    assert_same_bits(whole, again)


def test_the_rise_after_the_climb_is_the_oracles() -> None:
    config = Config(max_lr=1e6)
    rates = Rates(*map(jnp.float32, (1e-3, config.min_lr, config.max_lr, 0.0)))

    @jax.vmap
    def rise(rho: jax.Array, growth: jax.Array, agreement: jax.Array, peak: jax.Array) -> jax.Array:
        # Two steps of 100 elements, whose gradients are as long as G.
        before = Search(*map(jnp.float32, (0.0, 1e-4)), agreement, peak, jnp.float32(1), growth)
        found = Evidence(None, jnp.float32(100), jnp.float32(1), jnp.square(growth))
        return searched(before, [found], [jnp.square(rho) * 2e-4], rates, jnp.int32(50), config)[0].log_rate_scale

    points = random_rises()
    expected = [rise_after_climb(config, *point) for point in points]
    assert np.count_nonzero(expected) > 100
    # A handful of float32 roundings of logarithms that are below 1.
    np.testing.assert_allclose(rise(*jnp.asarray(points, jnp.float32).T), expected, atol=1e-6)


def test_the_climb_ends_where_half_of_the_agreement_is_gone() -> None:
    """Three in four gradients keep their signs, so the path stays straight and the agreement above its floor."""
    tx = automagic_8bit(1e-5, **{**FIELDS, "warmup_steps": 100, "max_lr": 1.0}, optim_bits=32)
    weights = jnp.zeros((64, 64))
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(weights.shape), jnp.float32)
    turning = np.arange(64) % 8 < 3
    state, update, seen = tx.init(weights), jax.jit(tx.update), []
    for t in range(60):
        before = search(state)[3]
        turned = bool(t >= 10 and t % 2)
        updates, state = update(jnp.where(turning & turned, -direction, direction), state, weights)
        weights += updates
        seen.append((search(state)[2], before, search(state)[3]))
    ended = next(t for t, (_, _, after) in enumerate(seen) if after < 0)
    agreement, peak, _ = seen[ended]
    assert 10 < ended < 59
    assert 0 < agreement < peak / 2
    assert all(a >= before / 2 for a, before, _ in seen[5:ended])


@pytest.mark.parametrize("length", [1.0, 0.25, 1.6])
def test_agreement_and_the_length_of_gradients_bound_the_rise(length: float) -> None:
    """Five of eight rows keep their signs after the climb, so A is about 0.25, and the path is straight."""
    tx = automagic_8bit(1e-5, **{**FIELDS, "warmup_steps": 100, "max_lr": 1e6, "straightness": 0.1}, optim_bits=32)
    weights = jnp.zeros((64, 64))
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(weights.shape), jnp.float32)
    turned = jnp.where(jnp.arange(64) % 8 < 3, -direction, direction)
    state, update = tx.init(weights), jax.jit(tx.update)
    before = 0.0
    for t in range(70):
        before = search(state)[0]
        g = (turned if t >= 10 and t % 2 == 1 else direction) * (length if t >= 25 else 1.0)
        updates, state = update(g, state, weights)
        weights = optax.apply_updates(weights, updates)
    ell, _, agreement, *_ = search(state)
    assert 0.1 < agreement < 0.3
    assert ell - before == pytest.approx(min(0.5 * 0.5 * min(1.0, 2 - length), 0.15), rel=1e-3)


def test_after_the_warm_up_and_without_a_walk_it_rests() -> None:
    half, weights = go_on(TX.init(params()), params(), range(CLIMBING))
    without, _ = go_on(finish_warmup(half), weights, range(CLIMBING, 7))
    assert search(without) == search(half)
    end, weights = go_on(half, weights, range(CLIMBING, 16))
    later, _ = go_on(end, weights, range(16, 18))
    assert search(later) == search(end)
    assert_same_bits(find_state(later).walk, find_state(end).walk)
    np.testing.assert_allclose(learning_rate(later), 1e-4 * np.exp(search(end)[0]), rtol=1e-6)
    assert learning_rate(later) > 1.5e-4
    off = find_state(automagic_8bit(1e-4, search_gain=0.0).init(params()))
    assert off.walk is None


def test_an_absent_array_has_travelled_and_a_zero_gradient_does_not_count() -> None:
    # With all gradients absent or zero nothing is measured, and nothing rises.  In the climb no energy is kept.
    nothing = jax.tree.map(jnp.zeros_like, grads(0)) | {"table": None}
    climbing, weights = go_on(TX.init(params()), params(), range(CLIMBING))
    _, idle = TX.update(nothing, climbing, weights)
    ell, _, *rest = search(climbing)
    assert search(idle) == [ell, 0, *rest]
    half, weights = go_on(climbing, weights, range(CLIMBING, RISING))
    _, idle = TX.update(nothing, half, weights)
    assert search(idle) == search(half)
    # The kernel alone: its elements count, and every array's walk does.
    alone = {"dense": {"kernel": grads(RISING)["dense"]["kernel"], "bias": None}, "table": None, "scale": None}
    _, after = TX.update(alone, half, weights)
    ell, energy, *_ = search(half)
    rate = 1e-4 * np.exp(ell)
    np.testing.assert_allclose(search(after)[1], energy + rate**2 * 4096, rtol=1e-6)
    walks = jax.tree.leaves(find_state(after).walk)
    rho = np.sqrt(sum(float(np.square(np.asarray(walk, np.float64)).sum()) for walk in walks) / search(after)[1])
    risen = ell + min(0.5 * min(np.log(rho / 0.8), 0.5), 0.15)
    assert rho > 0.8
    np.testing.assert_allclose(search(after)[0], risen, rtol=1e-5)
    assert search(after)[2] > 0
    for name in ("table", "scale"):
        assert_same_bits(find_state(after).walk[name], find_state(half).walk[name])


def test_under_multi_steps_a_call_is_one_step() -> None:
    tx = optax.MultiSteps(automagic_8bit(1e-4, **FIELDS), 2)
    weights, state, update = params(), tx.init(params()), jax.jit(tx.update)
    plain, plain_weights = TX.init(params()), params()
    for t in range(6):
        updates, state = update(grads(t // 2), state, weights)
        weights = optax.apply_updates(weights, updates)
        if t % 2:
            updates, plain = TX.update(grads(t // 2), plain, plain_weights)
            plain_weights = optax.apply_updates(plain_weights, updates)
    # The mean of two equal gradients is one of them; inside its condition the same program may round otherwise.
    np.testing.assert_allclose(search(state.inner_opt_state), search(plain), rtol=1e-5)
    assert search(plain)[0] == pytest.approx(START + 3 * 0.4)


def test_the_search_stops_at_max_lr() -> None:
    guarded = automagic_8bit(1e-4, **FIELDS | {"max_lr": 1.2e-4})
    _, state = train(guarded, 10)
    np.testing.assert_allclose(search(state)[0], np.log(1.2), rtol=1e-5)
    assert float(learning_rate(state)) <= np.float32(1.2e-4)


@pytest.mark.parametrize("rate", [np.nan, np.inf, -1e-3])
@pytest.mark.parametrize("at", [0, 7])
def test_a_rate_that_is_none_counts_as_0(rate: float, at: int) -> None:
    def after(one: float) -> Any:
        schedule = lambda t: jnp.where(t == at, one, 1e-4)  # noqa: E731
        tx = automagic_8bit(schedule, **FIELDS)
        state, weights, update = tx.init(params()), params(), jax.jit(tx.update)
        for t in range(10):
            updates, state = update(gradient(t), state, weights)
            weights = optax.apply_updates(weights, updates)
        return state, weights

    broken = after(rate)
    assert_same_bits(broken, after(0.0))
    assert 1e-5 < float(learning_rate(broken[0])) <= 1e-2
