"""`transform`, states saved by pickle; a part of the modules trained by `optax.masked`"""

from __future__ import annotations

import pickle
from typing import Any

import jax
import optax
import pytest

from automagic_optax import automagic_8bit
from tests.integrations.jax_runs import FIELDS, OPTIMIZERS, SAVED_AT, STEPS, assert_same_bits, batch, has_codes, loss

hk = pytest.importorskip("haiku")

DISTRIBUTIONS = ("dm-haiku",)


def network() -> Any:
    return hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 16])(x)))


def begin(tx: Any, seed: int = 0) -> tuple[Any, Any]:
    params = network().init(jax.random.key(seed), batch(0))
    return params, tx.init(params)


def step_of(tx: Any) -> Any:
    @jax.jit
    def step(params: Any, opt_state: Any, x: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(lambda params: loss(network().apply(params, x), x))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_undisturbed_one(name: str) -> None:
    tx = OPTIMIZERS[name]()
    step, run, saved = step_of(tx), begin(tx), {}
    for number in range(STEPS):
        if number in SAVED_AT:
            saved[number] = pickle.dumps(jax.device_get(run))
        run = step(*run, batch(number))
    assert has_codes(run[1])
    for saved_at, file in saved.items():
        resumed = pickle.loads(file)
        for number in range(saved_at, STEPS):
            resumed = step(*resumed, batch(number))
        assert_same_bits(resumed, run)


def test_a_part_of_the_modules_is_trained() -> None:
    """Haiku's own `data_structures.map` makes the mask."""

    def last(params: Any) -> Any:
        return hk.data_structures.map(lambda module, name, value: module.endswith("linear_1"), params)

    def others(params: Any) -> Any:
        return jax.tree.map(lambda trained: not trained, last(params))

    tx = automagic_8bit(1e-3, **FIELDS | {"search_gain": 0.0})  # a search begins with steps that float32 may lose
    tx = optax.chain(optax.masked(tx, last), optax.masked(optax.set_to_zero(), others))
    step, (params, state) = step_of(tx), begin(tx)
    before = params
    for number in range(3):
        params, state = step(params, state, batch(number))
    assert_same_bits(params["mlp/~/linear_0"], before["mlp/~/linear_0"])
    assert (params["mlp/~/linear_1"]["w"] != before["mlp/~/linear_1"]["w"]).all()
