"""`optax.inject_hyperparams(automagic_8bit, static_args=("lora", "embedding"))`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_core import Config
from automagic_optax import automagic_8bit, finish_warmup, learning_rate, memory_report, metrics, scale_by_cameamp
from tests.optax_side.small import assert_nearly_same, assert_same_bits, find_state, grads, params

pytestmark = pytest.mark.compiled_quickly
inject = optax.inject_hyperparams(automagic_8bit, static_args=("lora", "embedding"))
MARKS: dict[str, Any] = {"dense": {"kernel": False, "bias": False}, "table": True, "scale": False}


def follow(tx: Any, steps: int = 3) -> tuple[list[Any], Any]:
    """The updates of some steps, operation by operation, and the last state."""
    weights, found = params(), []
    state = tx.init(weights)
    for t in range(steps):
        updates, state = tx.update(grads(t), state, weights)
        weights = optax.apply_updates(weights, updates)
        found.append(updates)
    return found, state


CASES: dict[str, dict[str, Any]] = {
    "numbers": {"learning_rate": 1e-4, "weight_decay": 0.1},
    "schedules": {
        "learning_rate": optax.linear_schedule(1e-4, 1e-5, 10),
        "weight_decay": 0.1,
    },
    "overrides": {"learning_rate": 1e-4, "weight_decay": 0.1, "warmup_steps": 2, "max_lr": 0.01, "block_size": 64},
    "profile": {"learning_rate": 1e-4, "profile": "memory_optimized", "layout": "flax"},
    "marks": {"learning_rate": 1e-4, "weight_decay": 0.1, "lora": MARKS, "embedding": MARKS},
    "predicates": {
        "learning_rate": 1e-4,
        "lora": lambda path, leaf: leaf.ndim == 2,
        "embedding": lambda path, leaf: "table" in jax.tree_util.keystr(path),
    },
    "decay mask": {"learning_rate": 1e-4, "weight_decay": 0.1, "weight_decay_mask": MARKS},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_transformation_that_was_not_injected(name: str) -> None:
    arguments = CASES[name]
    injected, state = follow(inject(**arguments))
    plain, plain_state = follow(automagic_8bit(**arguments))
    # The injected rate is a float32 scalar, which the plain number becomes as well: the same bits.
    assert_same_bits(injected, plain)
    assert_same_bits(state.inner_state, plain_state)
    assert set(state.hyperparams) == {"learning_rate", "weight_decay"}


def test_a_decay_beside_the_config_is_the_one_that_counts() -> None:
    beside, _ = follow(scale_by_cameamp(1e-4, weight_decay=jnp.float32(0.3), config=Config(weight_decay=0.1)))
    assert_same_bits(beside, follow(scale_by_cameamp(1e-4, config=Config(weight_decay=0.3)))[0])


def test_overrides_pass_through() -> None:
    _, state = follow(inject(learning_rate=1e-4, warmup_steps=0, optim_bits=32, search_gain=0.0))
    cameamp = find_state(state)
    assert cameamp.walk is None
    assert cameamp.lr_mask is None
    assert cameamp.exp_avg["dense"]["kernel"].dtype == np.float32
    given_as_one = inject(learning_rate=1e-4, overrides={"warmup_steps": 0}).init(params())
    assert find_state(given_as_one).walk is None
    with pytest.raises(ValueError, match="block_size = 100"):
        inject(learning_rate=1e-4, block_size=100).init(params())
    with pytest.raises(ValueError, match="warmup_stepz = 5"):
        inject(learning_rate=1e-4, warmup_stepz=5).init(params())


@pytest.mark.parametrize("config", [{}, {"config": Config(lr=1e-4)}], ids=["alone", "beside a config"])
def test_overrides_are_no_place_for_arguments(config: dict[str, Any]) -> None:
    for name, value in (("lr", 5e-4), ("weight_decay", 0.5), ("profile", "balanced")):
        with pytest.raises(ValueError, match=f"overrides has {name}, which automagic_8bit takes as arguments"):
            automagic_8bit(**{"learning_rate": 1e-4} | config, overrides={name: value, "warmup_steps": 5})
    with pytest.raises(ValueError, match=r"profile = \['balanced'\] is not valid"):
        automagic_8bit(**{"learning_rate": 1e-4} | config, profile=["balanced"])


def test_arrays_as_fields_are_their_numbers() -> None:
    fields = {"betas": (0.5, 0.75, 0.875), "torque_decay": 0.5, "warmup_steps": 2}
    arrays = {"betas": tuple(map(jnp.float32, fields["betas"])), "torque_decay": jnp.float32(0.5)}
    found = [
        jax.jit(tx.update)(grads(0), tx.init(params()), params())[0]
        for tx in (automagic_8bit(1e-4, **fields), automagic_8bit(1e-4, **fields | arrays))
    ]
    assert_same_bits(*found)


def test_every_number_but_integers_and_decays_may_be_traced() -> None:
    plain = Config(lr_mask_gain=0.1, spatial_scope="all", low_rank_emphasis=1.1)
    names = [name for name, value in plain.__dict__.items() if type(value) is float]
    numbers = {name: getattr(plain, name) for name in names if name not in ("lr", "weight_decay", "torque_decay")}
    weights, others = params(), {"spatial_scope": "all", "warmup_steps": 2}

    def step(fields: dict[str, Any]) -> Any:
        tx = automagic_8bit(1e-4, **others, **fields)
        return tx.update(grads(0), tx.init(weights), weights)[0]

    assert len(numbers) == 13
    assert_nearly_same(jax.jit(step)(numbers), jax.jit(partial(step, numbers))())


def test_injected_values_can_be_changed_between_steps_without_compiling_again() -> None:
    tx = inject(learning_rate=1e-4, weight_decay=0.1, warmup_steps=0, search_gain=0.0)
    update = jax.jit(tx.update)
    weights, state = params(), tx.init(params())
    before, state = update(grads(0), state, weights)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    nothing, _ = update(grads(1), state, weights)
    assert not any(np.asarray(u).any() for u in jax.tree.leaves(nothing))
    state.hyperparams["learning_rate"] = jnp.float32(1e-4)
    with_decay, _ = update(grads(1), state, weights)
    state.hyperparams["weight_decay"] = jnp.float32(0.0)
    without, _ = update(grads(1), state, weights)
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), with_decay, without)
    assert all(x > 0 for x in jax.tree.leaves(difference))
    assert update._cache_size() == 1
    assert all(np.asarray(u).any() for u in jax.tree.leaves(before))


def test_a_schedule_is_followed() -> None:
    tx = inject(learning_rate=lambda count: 1e-4 * (count + 1), weight_decay=optax.linear_schedule(0.4, 0.0, 4))
    state = tx.init(params())
    for t in range(3):
        _, state = tx.update(grads(t), state, params())
        assert float(state.hyperparams["learning_rate"]) == pytest.approx(1e-4 * (t + 1))
        assert float(state.hyperparams["weight_decay"]) == pytest.approx(0.4 - 0.1 * t)


def test_reports_look_inside() -> None:
    tx = inject(learning_rate=1e-4, warmup_steps=2)
    _, state = follow(tx)
    plain = automagic_8bit(1e-4, warmup_steps=2).init(params())
    report = memory_report(state)
    assert report["total_parameters"] == memory_report(plain)["total_parameters"] == 4096 + 7 + 45 + 1
    finished = finish_warmup(state)
    rows = 256 + 1 + 5 + 1
    assert memory_report(finished)["state_bytes"] == report["state_bytes"] - 4 * rows
    weights = params()
    assert_same_bits(tx.update(grads(9), finished, weights)[0], tx.update(grads(9), state, weights)[0])


def test_the_rate_in_force_inside_jit_and_in_the_metrics() -> None:
    tx = inject(learning_rate=1e-4, warmup_steps=8, max_lr=1e-2, straightness=0.5)

    @jax.jit
    def step(state: Any, g: Any) -> Any:
        _, state = tx.update(g, state, params())
        return state, learning_rate(state)

    state, factor = tx.init(params()), 0.1
    assert learning_rate(state) == 0
    for t in range(10):
        state, rate = step(state, grads(t))
        assert rate == pytest.approx(1e-4 * factor, rel=2e-6)
        factor = float(np.exp(find_state(state).log_rate_scale))
    assert factor > 1.1
    assert metrics(state)["learning_rate"] == pytest.approx(float(rate))
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(1e-4)


def test_lr_and_config_name_the_same_transformation() -> None:
    config = Config(lr=1e-4, weight_decay=0.1, warmup_steps=2)
    wanted, _ = follow(automagic_8bit(1e-4, weight_decay=0.1, warmup_steps=2))
    for tx in (automagic_8bit(config), automagic_8bit(config=config), automagic_8bit(**config.__dict__)):
        assert_same_bits(follow(tx)[0], wanted)
    # The default counts too where it is given.
    given = automagic_8bit(config=config, weight_decay=Config().weight_decay)
    assert_same_bits(follow(given)[0], follow(automagic_8bit(1e-4, warmup_steps=2))[0])
    with pytest.raises(ValueError, match="two names of one argument"):
        automagic_8bit(1e-4, lr=1e-4)
    with pytest.raises(ValueError, match="no learning rate"):
        automagic_8bit()
