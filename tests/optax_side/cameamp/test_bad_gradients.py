"""Section 6: a gradient that is not finite, or above 10¹⁵, leaves its array and that array's states as they were."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_optax import ScaleByCameampState, automagic_8bit
from tests.optax_side.small import assert_same_bits, find_state, grads, params, quantized_leaves

pytestmark = pytest.mark.compiled_quickly
# 8-bit states of every kind for all arrays, the small ones included.
TX = automagic_8bit(
    1e-4, warmup_steps=10, weight_decay=0.1, torque_decay=0.5, factored="none", min_8bit_size=1, max_lr=1e-2
)
NAMES = ["kernel", "bias", "table", "scale"]
BAD = [np.nan, np.inf, -np.inf, 1.01e15, -3e38]


def with_negative_zeros() -> Any:
    """Parameters some of which are −0.0, and all of them float32 or half precision."""
    weights = params()
    weights["dense"]["kernel"] = weights["dense"]["kernel"].at[:, ::3].set(-0.0)
    weights["dense"]["bias"] = jnp.full(7, -0.0, jnp.bfloat16)
    weights["table"] = weights["table"].at[0].set(-0.0).astype(jnp.float16)
    weights["scale"] = jnp.float32(-0.0)
    return weights


def gradient(step: int) -> Any:
    return jax.tree.map(lambda g, w: g.astype(w.dtype), grads(step), with_negative_zeros())


def of(tree: Any, name: str) -> Any:
    return tree["dense"][name] if name in ("kernel", "bias") else tree[name]


def spoilt(step: int, name: str, value: float) -> Any:
    tree = gradient(step)
    place = tree["dense"] if name in ("kernel", "bias") else tree
    # The last element; float16 cannot hold 10¹⁵, where it becomes infinite.
    place[name] = place[name].at[(-1,) * place[name].ndim].set(value)
    return tree


def array_states(state: Any, name: str) -> dict[str, Any]:
    cameamp = find_state(state)
    trees = cameamp._asdict()
    shared = ("step", *SEARCH_SCALARS, "learning_rate")
    return {k: of(tree, name) for k, tree in trees.items() if tree is not None and k not in shared}


@jax.jit
def step(weights: Any, state: Any, g: Any) -> tuple[Any, Any, Any]:
    updates, state = TX.update(g, state, weights)
    return optax.apply_updates(weights, updates), updates, state


def warmed_up() -> tuple[Any, Any]:
    weights = with_negative_zeros()
    state = TX.init(weights)
    for t in range(3):
        weights, _, state = step(weights, state, gradient(t))
    # The steps moved the zeros: put them back.
    return with_negative_zeros(), state


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", BAD)
def test_the_array_and_its_states_stay_bit_for_bit(name: str, value: float) -> None:
    weights, state = warmed_up()
    new, updates, after = step(weights, state, spoilt(3, name, value))
    before_array, after_array = array_states(state, name), array_states(after, name)
    assert len(quantized_leaves(before_array)) == 4
    assert_same_bits(of(new, name), of(weights, name))
    assert np.signbit(np.asarray(of(weights, name), np.float32)).any()
    assert_same_bits({**after_array, "skipped_steps": 0}, {**before_array, "skipped_steps": 0})
    assert int(after_array["skipped_steps"]) == int(before_array["skipped_steps"]) + 1 == 1
    assert int(find_state(after).step) == 4
    assert np.isfinite(float(find_state(after).log_rate_scale))
    assert not np.asarray(of(updates, name), np.float32).any()

    # The other arrays step as if nothing had happened to it.
    undisturbed, _, expected = step(weights, state, gradient(3))
    for other in NAMES:
        if other != name:
            assert_same_bits(of(new, other), of(undisturbed, other))
            ours, theirs = array_states(after, other), array_states(expected, other)
            # `lr_mask` is relative to the mean vote, in which the skipped array has no part.
            assert_same_bits({**ours, "lr_mask": None}, {**theirs, "lr_mask": None})

    # The next finite gradient goes on where the array stood.
    again, _, later = step(new, after, gradient(4))
    assert int(array_states(later, name)["age"]) == 4
    assert int(array_states(later, name)["skipped_steps"]) == 1
    assert int(array_states(later, NAMES[0] if name != "kernel" else "bias")["age"]) == 5
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((again, later)))
    assert np.asarray(of(again, "kernel") != of(new, "kernel")).any()


@pytest.mark.slow
def test_operation_by_operation_negative_zeros_stay_as_well() -> None:
    weights = params()
    weights["scale"], weights["table"] = jnp.float32(-0.0), jnp.full((9, 5), -0.0)
    bad = grads()
    bad["scale"], bad["table"] = jnp.float32(np.nan), bad["table"].at[0, 0].set(jnp.inf)
    tx = automagic_8bit(1e-4)
    updates, _ = tx.update(bad, tx.init(weights), weights)
    new = optax.apply_updates(weights, updates)
    assert_same_bits({k: new[k] for k in ("scale", "table")}, {k: weights[k] for k in ("scale", "table")})


def test_every_array_bad_and_the_first_step_bad() -> None:
    weights = with_negative_zeros()
    first = TX.init(weights)
    nothing = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), weights)
    new, _, state = step(weights, first, nothing)
    new, _, state = step(new, state, nothing)
    assert_same_bits(new, weights)
    for name in NAMES:
        now, before = array_states(state, name), array_states(first, name)
        assert int(now["skipped_steps"]) == 2
        assert_same_bits({**now, "skipped_steps": 0}, {**before, "skipped_steps": 0})
    # Step 1 has set where the search begins; nothing has risen.
    assert float(find_state(state).log_rate_scale) == pytest.approx(np.log(1e-5 / 1e-4))
    # From here on it is a fresh start, but for the global t.
    new, _, state = step(new, state, gradient(0))
    assert [int(x) for x in jax.tree.leaves(find_state(state).age)] == [1] * 4
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((new, state)))


def test_the_largest_gradient_that_counts() -> None:
    weights, state = warmed_up()
    large = gradient(3)
    large["dense"]["kernel"] = large["dense"]["kernel"].at[0, 0].set(1e15).at[1, 1].set(-1e15)
    new, _, after = step(weights, state, large)
    assert int(array_states(after, "kernel")["skipped_steps"]) == 0
    assert int(array_states(after, "kernel")["age"]) == 4
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((new, after)))
    for t in range(4, 12):
        new, _, after = step(new, after, gradient(t))
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((new, after)))
    too_large = gradient(12)
    next_float = np.nextafter(np.float32(1e15), np.float32(np.inf))
    too_large["dense"]["kernel"] = too_large["dense"]["kernel"].at[0, 0].set(next_float)
    assert int(array_states(step(new, after, too_large)[2], "kernel")["skipped_steps"]) == 1


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-10, 1e10, 1e14])
def test_finite_gradients_of_every_size_stay_finite(size: float) -> None:
    weights, state = with_negative_zeros(), TX.init(with_negative_zeros())
    for t in range(12):
        # float16 does not reach these sizes: inf there is skipped, 0 is a gradient of zero.
        scale = jnp.float32(size if t % 3 else 0.0)
        g = jax.tree.map(lambda g, w, scale=scale: (g * scale).astype(w.dtype), grads(t), weights)
        weights, _, state = step(weights, state, g)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((weights, state)))
    assert int(array_states(state, "kernel")["age"]) == 12


@pytest.mark.parametrize("factored", ["second_moment", "all"])
def test_factored_states_stay_as_well(factored: str) -> None:
    tx = automagic_8bit(1e-4, factored=factored, warmup_steps=3)
    weights, update = params(), jax.jit(tx.update)
    state = tx.init(weights)
    for t in range(2):
        _, state = update(grads(t), state, weights)
    bad = grads(2)
    bad["table"] = bad["table"].at[3, 3].set(jnp.nan)
    updates, after = update(bad, state, weights)
    assert_same_bits(optax.apply_updates(weights, updates)["table"], weights["table"])
    ours, theirs = array_states(after, "table"), array_states(state, "table")
    assert_same_bits({**ours, "skipped_steps": 0}, {**theirs, "skipped_steps": 0})
    assert int(ours["skipped_steps"]) == 1
    assert int(array_states(after, "kernel")["age"]) == 3


@pytest.mark.parametrize("count", [1, 4], ids=["alone", "in a batch"])
def test_the_count_of_skipped_steps_saturates(count: int) -> None:
    tx = automagic_8bit(1e-4, search_gain=0.0)
    weights = [jnp.ones(3)] * count
    bad = [jnp.full(3, jnp.nan)] * count
    state = tx.init(weights)
    full = jnp.int32(2**31 - 1)
    # One more would be −2³¹: a negative number of skipped steps.
    state = jax.tree.map(
        lambda part: part._replace(skipped_steps=[full] * count) if isinstance(part, ScaleByCameampState) else part,
        state,
        is_leaf=lambda part: isinstance(part, ScaleByCameampState),
    )
    _, after = jax.jit(tx.update)(bad, state, weights)
    assert [int(x) for x in find_state(after).skipped_steps] == [2**31 - 1] * count


@pytest.mark.parametrize("factored", ["second_moment", "all"])
def test_an_array_whose_first_gradients_are_zero_moves_later(factored: str) -> None:
    """With a β₂ so close to 1 that R then begins below the normal numbers of float32, which XLA takes for 0."""
    betas = (0.9, 1 - 1e-8, 0.999)
    tx = automagic_8bit(1e-3, betas=betas, factored=factored, search_gain=0, warmup_steps=0, weight_decay=0)
    weights = jnp.ones((64, 64))
    state = tx.init(weights)
    for size in (0, 0, 1):
        update, state = tx.update(size * jnp.ones((64, 64)), state, weights)
    assert jnp.abs(update).min() > 1e-4
