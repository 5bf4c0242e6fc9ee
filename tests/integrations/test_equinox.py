"""`filter_jit`, an MLP with frozen layers, states through `tree_serialise_leaves`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from automagic_optax import finish_warmup
from tests.integrations.jax_runs import OPTIMIZERS, SAVED_AT, STEPS, assert_same_bits, batch, has_codes, loss

eqx = pytest.importorskip("equinox")

DISTRIBUTIONS = ("equinox",)


def begin(tx: Any, seed: int = 0) -> tuple[Any, Any]:
    model = eqx.nn.MLP(16, 16, 32, 2, key=jax.random.key(seed))
    return model, tx.init(eqx.filter(model, eqx.is_inexact_array))


def step_of(tx: Any) -> Any:
    @eqx.filter_jit
    def step(model: Any, opt_state: Any, x: jax.Array) -> tuple[Any, Any]:
        grads = eqx.filter_grad(lambda model: loss(jax.vmap(model)(x), x))(model)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), opt_state

    return step


def arrays(tree: Any) -> Any:
    return eqx.filter(tree, eqx.is_array)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_undisturbed_one(name: str, tmp_path: Path) -> None:
    tx = OPTIMIZERS[name]()
    step, run = step_of(tx), begin(tx)
    for number in range(STEPS):
        if number in SAVED_AT:
            eqx.tree_serialise_leaves(tmp_path / f"{number}.eqx", run)
        run = step(*run, batch(number))
    assert has_codes(run[1])
    for saved_at in SAVED_AT:
        resumed = eqx.tree_deserialise_leaves(tmp_path / f"{saved_at}.eqx", begin(tx, seed=1))
        for number in range(saved_at, STEPS):
            resumed = step(*resumed, batch(number))
        assert_same_bits(arrays(resumed), arrays(run))


def test_a_finished_state_loads_into_one_that_was_finished_too(tmp_path: Path) -> None:
    tx = OPTIMIZERS["automagic_8bit"]()
    step, run = step_of(tx), begin(tx)
    for number in range(5):
        run = step(*run, batch(number))
    finished = finish_warmup(run[1])
    eqx.tree_serialise_leaves(tmp_path / "finished.eqx", finished)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "finished.eqx", finish_warmup(begin(tx, seed=1)[1]))
    assert_same_bits(loaded, finished)


def test_a_frozen_layer_stays() -> None:
    """Freezing as Equinox's users do: `partition` by a tree of booleans, so that frozen leaves are None."""
    tx = OPTIMIZERS["automagic_8bit"]()
    model, _ = begin(tx)
    spec = jax.tree.map(lambda _: False, model)
    spec = eqx.tree_at(lambda m: (m.layers[-1].weight, m.layers[-1].bias), spec, replace=(True, True))
    trained, frozen = eqx.partition(model, spec)
    state = tx.init(trained)

    @eqx.filter_jit
    def step(trained: Any, state: Any, x: jax.Array) -> tuple[Any, Any]:
        grads = eqx.filter_grad(lambda t: loss(jax.vmap(eqx.combine(t, frozen))(x), x))(trained)
        updates, state = tx.update(grads, state, trained)
        return eqx.apply_updates(trained, updates), state

    for number in range(3):
        trained, state = step(trained, state, batch(number))
    after = eqx.combine(trained, frozen)
    assert_same_bits(arrays(after.layers[:-1]), arrays(model.layers[:-1]))
    assert (after.layers[-1].weight != model.layers[-1].weight).all()
