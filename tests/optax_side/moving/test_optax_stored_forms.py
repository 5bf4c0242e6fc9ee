"""States as they are where that is not as `tx.init` makes them: emptied containers, shared buffers, other forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

from automagic_core import Config
from automagic_optax import (
    QuantizedArray,
    automagic_8bit,
    check_training_health,
    from_adam_state,
    learning_rate,
    load_state_file,
    memory_report,
    metrics,
    progressive_quantization,
    requantized,
    restore,
    save_state_file,
)
from tests.optax_side.small import assert_same_bits, find_state

pytestmark = pytest.mark.compiled_quickly
FIELDS: dict[str, Any] = {"warmup_steps": 20}


def saved(state: Any, path: Path) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
    return path


def matrices_alone(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim == 2, params)


def test_a_none_among_the_parameters_comes_back(tmp_path: Path) -> None:
    params = {"w": jnp.ones((8, 8)), "nothing": None}
    tx = automagic_8bit(1e-3, **FIELDS)
    _, state = tx.update(params, tx.init(params), params)
    assert_same_bits(restore(saved(state, tmp_path / "state"), tx, params), state)
    assert_same_bits(serialization.from_bytes(tx.init(params), serialization.to_bytes(state)), state)


def test_containers_that_a_mask_emptied_come_back_and_move(tmp_path: Path) -> None:
    params = nnx.state(nnx.Linear(32, 64, rngs=nnx.Rngs(0)), nnx.Param)
    tx = optax.masked(automagic_8bit(1e-3, optim_bits=32, **FIELDS), matrices_alone)
    state = tx.init(params)
    assert_same_bits(restore(saved(state, tmp_path / "state"), tx, params), state)
    moved = progressive_quantization(state, 9, 10)
    assert [x.dtype for x in jax.tree.leaves(find_state(moved).exp_avg)] == [jnp.uint8, jnp.float32]


def test_states_from_elsewhere_can_be_donated(tmp_path: Path) -> None:
    params = {"w": jnp.ones((8, 8))}
    tx, adam = automagic_8bit(1e-3, **FIELDS), optax.adam(1e-3)
    file = tmp_path / "state.safetensors"
    save_state_file(file, tx.init(params), params, Config(lr=1e-3, **FIELDS))
    adam_state = adam.update(params, adam.init(params), params)[1]
    for state in (
        requantized(tx.init(params), params, tx)[0],
        load_state_file(file, params).opt_state,
        from_adam_state(adam_state, params, tx)[0],
    ):
        buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
        assert len(set(buffers)) == len(buffers)
        jax.jit(tx.update, donate_argnums=1)(params, state, params)


def test_what_progressive_quantization_stored_is_restored_into_its_own_form(tmp_path: Path) -> None:
    params = {"w": jnp.ones((64, 64)), "s": jnp.zeros(())}
    tx = automagic_8bit(1e-3, optim_bits=32, **FIELDS)
    state = progressive_quantization(tx.init(params), 9, 10)
    path, data = saved(state, tmp_path / "state"), serialization.to_bytes(state)
    target = progressive_quantization(tx.init(params), 9, 10)
    assert_same_bits(serialization.from_bytes(target, data), state)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same_bits(checkpointer.restore(path, target), state)
    with pytest.raises(ValueError, match=r"saved in 8 bits that have 32 bits here.*progressive_quantization\(tx"):
        serialization.from_bytes(tx.init(params), data)
    with pytest.raises(ValueError, match="saved in 8 bits that have 32 bits here"):
        restore(path, tx, params)


def test_a_state_file_has_the_blocks_of_the_states(tmp_path: Path) -> None:
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.float32)}
    fields = FIELDS | {"optim_bits": 32}
    tx = automagic_8bit(1e-3, **fields)
    state = tx.update(params, tx.init(params), params)[1]
    state = progressive_quantization(state, 9, 10, config=Config(block_size=64))
    save_state_file(tmp_path / "file", state, params, Config(**fields))
    loaded = load_state_file(tmp_path / "file", params).opt_state
    found = find_state(loaded).exp_avg["w"]
    assert isinstance(found, QuantizedArray)
    assert found.block_size == 64
    assert_same_bits(find_state(loaded).exp_avg, find_state(state).exp_avg)


def test_a_state_of_several_members_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    several, one = {"w": jnp.ones((3, 40, 32))}, {"w": jnp.ones((40, 32))}
    tx, adam = automagic_8bit(1e-3, **FIELDS), optax.adam(1e-3)
    state, config = jax.vmap(tx.init)(several), Config(lr=1e-3, **FIELDS)
    adam_state = jax.vmap(adam.update)(several, jax.vmap(adam.init)(several))[1]
    for params in (several, one):
        for call in (
            lambda state, params: metrics(state, config=config, params=params),
            lambda state, params: requantized(state, params, tx),
            lambda state, params: save_state_file(tmp_path / "file", state, params, config),
        ):
            with pytest.raises(ValueError, match=r"several members.*shape \(3,\).*tree\.map\(lambda x: x\[i\]"):
                call(state, params)
            call(jax.tree.map(lambda x: x[2], state), one)
        with pytest.raises(ValueError, match="several members"):
            from_adam_state(adam_state, params, tx)
    from_adam_state(jax.tree.map(lambda x: x[2], adam_state), one, tx)
    # These have an answer for all members.
    assert memory_report(state)["total_parameters"] == 3 * 40 * 32
    assert learning_rate(state).shape == (3,)
    assert check_training_health(state, [1.0], config=config)["status"] == "healthy"


@pytest.mark.parametrize("how", ["masked", "partition"])
def test_parameters_that_a_mask_took_out_are_named(tmp_path: Path, how: str) -> None:
    params, mask = {"w": jnp.ones((40, 32)), "b": jnp.ones(5)}, {"w": True, "b": False}
    tx = automagic_8bit(1e-3, **FIELDS)
    if how == "masked":
        outer = optax.masked(tx, mask)
        state, inner = outer.init(params), outer.init(params).inner_state
    else:
        outer = optax.partition({True: tx, False: optax.set_to_zero()}, mask)
        state, inner = outer.init(params), outer.init(params).inner_states[True]
    part = jax.tree.map(lambda x, here: x if here else optax.MaskedNode(), params, mask)
    adam, config = optax.adam(1e-3), Config(lr=1e-3, **FIELDS)
    calls = {
        "requantized": lambda state, params, tx: requantized(state, params, tx),
        "from_adam_state": lambda state, params, tx: from_adam_state(
            adam.update(params, adam.init(params))[1], params, tx
        ),
        "save_state_file": lambda state, params, tx: save_state_file(tmp_path / "file", state, params, config),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"has no state of b, which a mask .* optax\.MaskedNode\(\) in place"):
            call(state, params, outer)
        call(inner, part, tx)


def test_a_config_may_hold_numbers_of_numpy_and_jax(tmp_path: Path) -> None:
    params = {"w": jnp.ones((64, 64))}
    config = Config(
        lr=np.float32(1e-4),
        warmup_steps=np.int64(100),
        weight_decay=jnp.float32(0.01),
        betas=(np.float32(0.9), 0.99, 0.9),
    )
    fields = {name: value for name, value in config.__dict__.items() if name != "lr"}
    save_state_file(tmp_path / "file", automagic_8bit(config.lr, **fields).init(params), params, config)
    found = load_state_file(tmp_path / "file", params)
    assert found.fields["warmup_steps"] == 100
    assert found.fields["weight_decay"] == pytest.approx(0.01)
