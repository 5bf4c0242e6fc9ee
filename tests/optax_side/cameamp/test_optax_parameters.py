"""What an update is asked with: no parameters, wrong dtypes, wrong arguments, and trees of every kind."""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_optax import Config, OptimizationProfiles, automagic_8bit, round_to_parameters, scale_by_cameamp
from tests.optax_side.small import assert_same_bits, find_state, grads, params

pytestmark = pytest.mark.compiled_quickly
TX = automagic_8bit(1e-4, weight_decay=0.1)


@pytest.mark.parametrize("make", [lambda: TX, lambda: scale_by_cameamp(1e-4), round_to_parameters])
def test_no_params_is_optaxs_own_error(make: Any) -> None:
    tx = make()
    with pytest.raises(ValueError, match="params") as ours:
        tx.update(grads(), tx.init(params()))
    with pytest.raises(ValueError, match="params") as theirs:
        optax.add_decayed_weights(0.1).update(grads(), optax.EmptyState(), None)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", ["complex64", "int32", "uint8", "bool"])
@pytest.mark.parametrize("make", [lambda: TX, lambda: scale_by_cameamp(1e-4), round_to_parameters])
def test_parameters_that_are_not_floating_are_refused_by_name(make: Any, dtype: str) -> None:
    weights = {"fine": jnp.ones(3), "block": [{"kernel": jnp.ones((2, 2), dtype)}]}
    with pytest.raises(ValueError, match=rf"block\.0\.kernel has dtype {dtype}") as error:
        make().init(weights)
    assert "float32, bfloat16, float16, float64" in str(error.value)
    assert "optax.masked" in str(error.value)


@pytest.mark.parametrize("make", [lambda: TX, lambda: scale_by_cameamp(1e-4), round_to_parameters])
def test_a_key_of_random_numbers_is_refused_by_name(make: Any) -> None:
    with pytest.raises(ValueError, match=r"seed has dtype key<fry>; only float32.* optax\.masked"):
        make().init({"kernel": jnp.ones(3), "seed": jax.random.key(0)})


@pytest.mark.parametrize("shape", [(8, 5), (9, 4), (4,), (1, 4), (8, 4, 1)])
@pytest.mark.parametrize("tx", [TX, scale_by_cameamp(1e-4)])
def test_a_parameter_of_another_shape_than_in_init_is_named(tx: Any, shape: tuple[int, ...]) -> None:
    state = tx.init({"block": {"kernel": jnp.ones((8, 4))}, "bias": jnp.ones(4)})
    resized = {"block": {"kernel": jnp.ones(shape)}, "bias": jnp.ones(4)}
    with pytest.raises(
        ValueError, match=r"block\.kernel has shape \(.*\), but its \w+ in the state has shape"
    ) as error:
        tx.update(resized, state, resized)
    assert f"has shape {shape}, but" in str(error.value)
    # Broadcasting would hide this one.
    short = {"block": {"kernel": jnp.ones((8, 4))}, "bias": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"bias has shape \(1,\), but its exp_avg in the state has shape \(4,\)"):
        tx.update(short, state, short)


# Broadcasting would hide both.
@pytest.mark.parametrize("shape", [(1, 4), ()])
@pytest.mark.parametrize("tx", [TX, scale_by_cameamp(1e-4), automagic_8bit(1e-4, spatial_scope="all")])
def test_a_gradient_of_another_shape_than_its_parameter_is_named(tx: Any, shape: tuple[int, ...]) -> None:
    weights = {"block": {"kernel": jnp.ones((8, 4))}, "bias": jnp.ones(4)}
    gradients = {"block": {"kernel": jnp.ones(shape)}, "bias": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"block\.kernel has shape \(8, 4\), but its gradient has shape") as error:
        tx.update(gradients, tx.init(weights), weights)
    assert f"gradient has shape {shape};" in str(error.value)


def test_a_rate_of_one_element_changes_no_shape() -> None:
    weights = {"scale": jnp.ones(())}
    plain = scale_by_cameamp(jnp.float32(1e-4), weight_decay=jnp.float32(0.1))
    tx = scale_by_cameamp(jnp.full(1, 1e-4), weight_decay=jnp.full(1, 0.1))
    assert_same_bits(tx.update(weights, tx.init(weights), weights), plain.update(weights, plain.init(weights), weights))


@pytest.mark.parametrize("limit", [{}, {"gradient_limit": 1e15}], ids=["alone", "with a limit"])
@pytest.mark.parametrize("jit", [False, True])
def test_scale_by_cameamp_under_inject_hyperparams(jit: bool, limit: dict[str, float]) -> None:
    tx, plain = (
        optax.inject_hyperparams(scale_by_cameamp)(1e-4, weight_decay=0.1, **limit),
        scale_by_cameamp(1e-4, weight_decay=0.1),
    )
    state = tx.init(params())
    assert set(state.hyperparams) == {"learning_rate", "weight_decay", *limit}
    if jit:
        jax.eval_shape(tx.update, grads(), state, params())
        return
    ours, theirs = tx.update(grads(), state, params()), plain.update(grads(), plain.init(params()), params())
    assert_same_bits((ours[0], ours[1].inner_state), theirs)


def test_a_python_number_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"rate has dtype .*float"):
        TX.init({"rate": 1.0})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"learning_rate": 1.0}, r"lr = 1\.0 is outside \[min_lr, max_lr\]"),
        ({"learning_rate": -1e-4}, r"lr = -0\.0001 is not valid"),
        ({"learning_rate": 1e-4, "weight_decay": -1.0}, r"weight_decay = -1\.0 is not valid"),
        ({"learning_rate": 1e-4, "block_size": 100}, r"block_size = 100 is not valid; valid: a power of two"),
        ({"learning_rate": 1e-4, "profile": "tiny"}, r"profile = 'tiny' is not valid"),
        ({"learning_rate": 1e-4, "layout": "keras"}, r"layout = 'keras'"),
        ({"learning_rate": 1e-4, "lr": 1e-4}, r"lr = 0\.0001"),
        ({"learning_rate": 1e-4, "warmup": 3}, r"unknown field warmup = 3; did you mean 'warmup_steps'"),
        ({"learning_rate": 1e-4, "overrides": 3}, r"overrides = 3"),
        ({"learning_rate": 1e-4, "overrides": {"blocksize": 64}}, r"unknown field blocksize = 64"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        automagic_8bit(**arguments)


def test_scale_by_cameamp_takes_a_config() -> None:
    config = OptimizationProfiles.memory_optimized(lr=3e-4, weight_decay=0.2)
    tx = scale_by_cameamp(config=config)
    named = automagic_8bit(3e-4, weight_decay=0.2, profile="memory_optimized")
    weights = params()
    ours, theirs = (t.update(grads(), t.init(weights), weights)[0] for t in (tx, named))
    assert_same_bits(ours, theirs)
    broken = Config()
    broken.warmup_steps = -1
    with pytest.raises(ValueError, match="warmup_steps = -1"):
        scale_by_cameamp(config=broken)


def test_a_warm_up_too_short_for_the_search_is_told() -> None:
    with pytest.warns(UserWarning, match="warmup_steps = 8 is too short"):
        automagic_8bit(1e-3, warmup_steps=8)


def test_an_empty_tree() -> None:
    for empty in ({}, [], (), {"none": None}):
        state = TX.init(empty)
        updates, state = TX.update(empty, state, empty)
        assert jax.tree.leaves(updates) == []
        assert int(find_state(state).step) == 1


def test_none_leaves_scalars_and_arrays_without_elements() -> None:
    Pair = collections.namedtuple("Pair", "left right")
    weights = {
        "none": None,
        "scalar": jnp.float32(2.0),
        "pair": Pair(jnp.ones((0, 3)), [jnp.ones((4, 0)), jnp.ones(0), None]),
        "one": jnp.ones((1, 1)),
    }
    for tx in (TX, automagic_8bit(1e-4, factored="all", min_8bit_size=1, torque_decay=0.5)):
        state, update = tx.init(weights), jax.jit(tx.update)
        for _ in range(3):
            updates, state = update(jax.tree.map(jnp.ones_like, weights), state, weights)
            assert jax.tree.structure(updates) == jax.tree.structure(weights)
            assert updates["none"] is None
            assert updates["pair"].left.shape == (0, 3)
            assert float(updates["scalar"]) < 0
            assert float(updates["one"][0, 0]) < 0
        cameamp = find_state(state)
        assert int(cameamp.age["scalar"]) == 3
        assert int(cameamp.age["pair"].left) == 0  # an empty array takes no part
        assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state))
        assert float(cameamp.log_rate_scale) > np.log(1e-5 / 1e-4) + 0.79  # two rises at least


def test_an_array_without_a_gradient_does_not_age() -> None:
    weights = params()
    state = TX.init(weights)
    updates, state = TX.update(grads(0), state, weights)
    missing = grads(1)
    missing["table"] = None
    updates, after = TX.update(missing, state, weights)
    assert updates["table"] is None
    before, after_ = find_state(state), find_state(after)
    assert int(after_.step) == 2
    assert int(after_.age["table"]) == 1
    assert int(after_.age["scale"]) == 2
    for name in ("exp_avg", "exp_avg_sq", "skipped_steps"):
        assert_same_bits(getattr(after_, name)["table"], getattr(before, name)["table"])
    # In the climb a walk is that of the step alone, so that of an array that is not there is 0.
    assert np.any(before.walk["table"] != 0)
    assert not np.any(after_.walk["table"])


def test_numpy_parameters_and_gradients() -> None:
    weights = jax.tree.map(np.asarray, params())
    updates, _ = TX.update(jax.tree.map(np.asarray, grads()), TX.init(weights), weights)
    assert_same_bits(updates, TX.update(grads(), TX.init(params()), params())[0])
