"""flax: `TrainState` trains, and `flax.serialization` saves and restores bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, serialization
from flax.training.train_state import TrainState

from automagic_optax import automagic_8bit, finish_warmup, memory_report
from tests.optax_side.small import assert_nearly_same, assert_same_bits, find_state, quantized_leaves

pytestmark = pytest.mark.compiled_quickly


class Model(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.relu(linen.Conv(8, (3, 3))(x)).reshape(x.shape[0], -1)
        return linen.Dense(8, use_bias=False)(linen.relu(linen.Dense(32, use_bias=False)(x)))


MODEL = Model()
IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((16, 4, 4, 3)), jnp.float32)
TARGET = jnp.asarray(np.random.default_rng(1).standard_normal((16, 8)), jnp.float32)


# Four steps are too few for a search.
FIELDS = {"search_gain": 0.0, "lr_mask_gain": 0.1, "torque_decay": 0.5}
TX = automagic_8bit(1e-2, frequency_penalty=0.0, warmup_steps=4, max_lr=0.1, **FIELDS)


def create() -> TrainState:
    variables = MODEL.init(jax.random.key(0), IMAGES)
    return TrainState.create(apply_fn=MODEL.apply, params=variables["params"], tx=TX)


@jax.jit
def step(state: TrainState) -> tuple[TrainState, jax.Array]:
    def loss(params):
        return jnp.mean(jnp.square(state.apply_fn({"params": params}, IMAGES) - TARGET))

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def train(state: TrainState, steps: int) -> tuple[TrainState, list[float]]:
    losses = []
    for _ in range(steps):
        state, value = step(state)
        losses.append(float(value))
    return state, losses


@pytest.mark.slow
def test_it_trains() -> None:
    _, losses = train(create(), 40)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.slow  # tests of checkpoints go through a TrainState too, with and without the warm-up's states
@pytest.mark.parametrize("finished", [False, True])
def test_a_restored_state_continues_bit_for_bit(finished: bool) -> None:
    state, _ = train(create(), 6 if finished else 2)
    target = create()
    assert len(quantized_leaves(state.opt_state)) == 3
    if finished:
        state = state.replace(opt_state=finish_warmup(state.opt_state))
        target = target.replace(opt_state=finish_warmup(target.opt_state))
    saved = serialization.to_bytes(state)
    restored = serialization.from_bytes(target, saved)
    restored = jax.tree.map(jnp.asarray, restored)
    assert_same_bits(restored, state)
    assert serialization.to_bytes(restored) == saved
    assert_same_bits(train(restored, 3)[0], train(state, 3)[0])


def test_state_dict_holds_arrays_only() -> None:
    state = create()
    saved = serialization.to_state_dict(state)
    leaves = jax.tree.leaves(saved)
    assert all(hasattr(leaf, "dtype") or isinstance(leaf, int) for leaf in leaves)
    assert sum(leaf.dtype == np.uint8 for leaf in leaves if hasattr(leaf, "dtype")) == 3  # codes
    # What was saved takes no more than the arrays held and their names.
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)) + memory_report(state.opt_state)["state_bytes"]
    assert len(serialization.to_bytes(state)) < held + 200 * len(leaves)


@pytest.mark.slow  # tests of checkpoints take the step after `finish_warmup` too
def test_finish_warmup_and_report() -> None:
    state, _ = train(create(), 5)
    before = memory_report(state.opt_state)
    assert memory_report(state) == before
    finished = state.replace(opt_state=finish_warmup(state.opt_state))
    after = memory_report(finished.opt_state)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert before["total_parameters"] == after["total_parameters"] == count
    assert after["state_bytes"] < before["state_bytes"]
    assert find_state(finished.opt_state).s is None
    ours, theirs = train(finished, 2), train(state, 2)
    # A program without the two states may be fused otherwise: float32 rounding over two steps.
    assert_nearly_same(ours[0].params, theirs[0].params, 1e-5)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)


def test_inside_a_chain_with_another_state() -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), automagic_8bit(1e-4), optax.ema(0.9))
    params = {"kernel": jnp.ones((16, 256))}
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    state = jax.jit(lambda state: state.apply_gradients(grads=params))(state)
    restored = serialization.from_bytes(
        TrainState.create(apply_fn=None, params=params, tx=tx), serialization.to_bytes(state)
    )
    assert_same_bits(jax.tree.map(jnp.asarray, restored), jax.tree.map(jnp.asarray, state))
