"""Progressive quantization in JAX: when arrays move, what they hold then, and that steps go on, nnx included."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from automagic_core import Config, Slot
from automagic_optax import (
    QuantizedArray,
    automagic_8bit,
    finish_warmup,
    memory_report,
    progressive_quantization,
    quantize,
    random_unit,
)
from automagic_optax.cameamp.find_states import map_states
from tests.optax_side.small import assert_same_bits, find_state, quantized_leaves

pytestmark = pytest.mark.compiled_quickly
SHAPES = {"a": (80, 128), "embed": (64, 80), "d": (7,)}
BARE: dict[str, Any] = {"edge_suppression": False, "frequency_penalty": 0.0, "lora_rank_penalty": False}
FIELDS: dict[str, Any] = {"factored": "none", "warmup_steps": 6, "torque_decay": 0.5, **BARE}
SLOTS = {"exp_avg": Slot.exp_avg, "exp_avg_sq": Slot.exp_avg_sq, "exp_avg_res": Slot.exp_avg_res, "s": Slot.s}


def structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def arrays(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


def eight_bit(opt_state: Any) -> set[str]:
    return {name for name, value in find_state(opt_state).exp_avg.items() if isinstance(value, QuantizedArray)}


def test_arrays_move_once_at_their_time_by_quantizing_the_state_as_it_stands() -> None:
    params = arrays(0)
    tx = optax.chain(optax.clip_by_global_norm(1e3), automagic_8bit(1e-3, optim_bits=32, **FIELDS))
    rng = np.random.default_rng(1)

    def filled(x: jax.Array) -> jax.Array:
        return x if x.ndim == 0 else jnp.asarray(rng.random(x.shape), x.dtype)

    state = jax.tree.map(filled, tx.init(params))
    # Of 10 steps: 10240 elements at the end of the first phase, 5120 once 8192 · 4^(−(t − 2) / 6) is below it, the rest
    # in the last phase.
    moves_after = {"a": 2, "embed": 5, "d": 8}
    for t in range(1, 11):
        state = map_states(lambda _: find_state(state)._replace(step=jnp.asarray(t, jnp.int32)), state)  # noqa: B023
        before = state
        state = progressive_quantization(state, t, 10)
        assert eight_bit(state) == {name for name, after in moves_after.items() if t >= after}
        old, new = find_state(before), find_state(state)
        for field, slot in SLOTS.items():
            for name, value in getattr(old, field).items():
                stored = getattr(new, field)[name]
                if isinstance(value, QuantizedArray) or not isinstance(stored, QuantizedArray):
                    assert stored is value
                    continue
                signed = field in ("exp_avg", "s")
                x = value if signed else jnp.sqrt(value)
                assert_same_bits(stored, quantize(x, signed=signed, random=random_unit(t, slot, value.shape)))
        for field in set(old._fields) - set(SLOTS):
            assert getattr(new, field) is getattr(old, field)
        assert_same_bits(progressive_quantization(state, t, 10), state)
    report = memory_report(state)
    assert report["8bit_parameters"] == report["total_parameters"]
    # A fresh state takes the same form, so that a checkpoint can be read into it.
    fresh = progressive_quantization(tx.init(params), 10, 10)
    assert structure(fresh) == structure(state)


def test_rules_that_hold_in_the_last_phase() -> None:
    params = arrays(0)
    fields = {**FIELDS, "factored": "all", "stable_emb": True, "block_size": 64, "stochastic_rounding": False}
    tx = automagic_8bit(1e-3, optim_bits=32, **fields)
    state = tx.init(params)
    ours = find_state(state)
    state = map_states(lambda _: ours._replace(exp_avg=arrays(1)), state)
    exp_avg = find_state(state).exp_avg
    state = progressive_quantization(finish_warmup(state), 8, 10, config=Config(**fields), params=params)
    assert eight_bit(state) == {"a", "d"}  # `embed` is an embedding
    assert_same_bits(find_state(state).exp_avg["a"], quantize(exp_avg["a"], block_size=64))
    assert find_state(state).s is None
    # exp_avg of both, and the second moment and the residuals of the one that has no rows.
    assert len(quantized_leaves(state)) == 4


@pytest.mark.parametrize("axes", [(3,), (2, 2)], ids=["vmap", "vmap of vmap"])
def test_each_member_of_several_is_quantized_as_it_would_be_alone(axes: tuple[int, ...]) -> None:
    init = automagic_8bit(1e-3, optim_bits=32, **FIELDS).init
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.random(axes + x.shape), jnp.float32), arrays(0))
    for _ in axes:
        init = jax.vmap(init)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.random(x.shape), x.dtype) if x.dtype == jnp.float32 else x + 5, init(params)
    )
    # The members' embeddings have more elements together than one `a`, and more axes than an embedding.
    for step, stable, moved in ((4, False, {"a"}), (9, True, {"a", "d"})):
        config = Config(**FIELDS, stable_emb=stable)
        together = progressive_quantization(state, step, 10, config=config, params=params)
        assert eight_bit(together) == moved
        for member in np.ndindex(axes):
            alone = [jax.tree.map(lambda x: x[member], tree) for tree in (together, state, params)]  # noqa: B023
            theirs = progressive_quantization(alone[1], step, 10, config=config, params=alone[2])
            assert_same_bits(alone[0], theirs)


@pytest.mark.slow
def test_in_nnx() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layer = nnx.Linear(64, 64, use_bias=False, rngs=rngs)

    model = Model(nnx.Rngs(0))
    tx = automagic_8bit(1e-3, optim_bits=32, warmup_steps=3, spatial_awareness=False, **BARE)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    compiled = 0

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer) -> None:
        nonlocal compiled
        compiled += 1
        optimizer.update(model, nnx.grad(lambda m: (m.layer(jnp.ones((2, 64))) ** 2).mean())(model))

    for t in range(1, 5):
        step(model, optimizer)
        optimizer.opt_state = progressive_quantization(optimizer.opt_state, t, 4)
        assert memory_report(optimizer.opt_state)["8bit_parameters"] == {1: 0, 2: 4096, 3: 4096, 4: 4096}[t]
    for _ in range(2):
        step(model, optimizer)
    assert memory_report(optimizer.opt_state)["8bit_parameters"] == 4096
    assert compiled == 2  # in 32 bits, and with the kernel moved
    assert bool(jnp.isfinite(model.layer.kernel[...]).all())


def test_errors_name_what_is_wrong() -> None:
    params = {"w": jnp.ones((3, 3))}
    state = automagic_8bit(1e-3).init(params)
    with pytest.raises(TypeError, match="between jitted steps"):
        jax.jit(lambda step: progressive_quantization(state, step, 10))(1)
    with pytest.raises(ValueError, match="no ScaleByCameampState"):
        progressive_quantization(optax.adam(1e-3).init(params), 1, 10)
    with pytest.raises(ValueError, match="total_steps = 0"):
        progressive_quantization(state, 1, 0)
    with pytest.raises(ValueError, match="params are needed"):
        progressive_quantization(state, 1, 10, config=Config(stable_emb=True))
