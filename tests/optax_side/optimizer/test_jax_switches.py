"""Every debug switch of JAX that optax.adamw passes, and those that it does not pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from automagic_optax import (
    automagic_8bit,
    clip_by_percentile,
    encourage_low_rank,
    quantize_state,
    suppress_edges,
    suppress_high_frequencies,
)

pytestmark = pytest.mark.compiled_quickly
# What only raises, each with a message of its own: one run of `make test` has all of them.
RAISING: dict[str, Any] = {
    "jax_debug_nans": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_transfer_guard": "disallow",
}
SWITCHES: dict[str, dict[str, Any]] = {
    "all that raise": RAISING,
    "jax_debug_nans": {"jax_debug_nans": True},
    "jax_debug_infs": {"jax_debug_infs": True},
    "promotion": {"jax_numpy_rank_promotion": "raise", "jax_numpy_dtype_promotion": "strict"},
    "jax_check_tracer_leaks": {"jax_check_tracer_leaks": True},
    "jax_transfer_guard": {"jax_transfer_guard": "disallow"},
    "jax_enable_x64": {"jax_enable_x64": True},
    "jax_disable_jit": {"jax_disable_jit": True},
}
FIELDS: dict[str, Any] = {"min_8bit_size": 64, "warmup_steps": 3}
SGD = optax.sgd(1e-3, momentum=0.9)
TRANSFORMATIONS: dict[str, Any] = {
    "everything": automagic_8bit(1e-4, percentile_clipping=50, torque_decay=0.9, verbose=True, **FIELDS),
    "quantize_state": quantize_state(SGD, min_8bit_size=64),
    "memory_optimized": automagic_8bit(1e-4, profile="memory_optimized", **FIELDS),
    "quality_optimized": automagic_8bit(1e-4, profile="quality_optimized", **FIELDS),
    "schedule, one block": automagic_8bit(optax.linear_schedule(1e-4, 1e-3, 9), block_wise=False, **FIELDS),
    "32 bits": automagic_8bit(1e-4, optim_bits=32, warmup_steps=3),
    "clip_by_percentile": optax.chain(clip_by_percentile(50), SGD),
    "suppress_edges": optax.chain(suppress_edges(), SGD),
    "suppress_high_frequencies": optax.chain(suppress_high_frequencies(), SGD),
    "encourage_low_rank": optax.chain(encourage_low_rank(), SGD),
    "injected": optax.inject_hyperparams(automagic_8bit)(learning_rate=1e-4, **FIELDS),
}
OPTAX_FAILS = {("jax_transfer_guard", False)}  # optax itself makes its zeros from Python numbers, outside jit


def tree(seed: int, dtype: Any, whole: bool) -> Any:
    shapes: Any = {"conv": (3, 4, 2, 8), "lora_a": (16, 4), "bias": (8,)}
    if whole:
        shapes |= {"scale": (), "same": [(4, 16)] * 4}
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    values = [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, values)


def runs(tx: Any, switch: str, jitted: bool, dtype: Any, whole: bool = False) -> None:
    params, grads = tree(0, dtype, whole), tree(1, dtype, whole)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    before = {name: getattr(jax.config, name) for name in SWITCHES[switch]}
    try:
        for name, value in SWITCHES[switch].items():
            jax.config.update(name, value)
        init, step = (jax.jit(tx.init), jax.jit(step)) if jitted else (tx.init, step)
        state = init(params)
        for _ in range(2):
            new, state = step(params, state, grads)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert all(jnp.isfinite(w).all() and w.dtype == dtype for w in jax.tree.leaves(new))
    assert (new["conv"] != params["conv"]).any()


# Slow by themselves, much like another one, or in the run of all.
SLOW = set(SWITCHES) - {"all that raise"}  # test_optax_precision has x64


@pytest.mark.parametrize("switch", [pytest.param(s, marks=pytest.mark.slow if s in SLOW else ()) for s in SWITCHES])
def test_compiled_and_eager(switch: str) -> None:
    runs(TRANSFORMATIONS["everything"], switch, True, jnp.bfloat16)
    if switch != "jax_disable_jit":
        runs(TRANSFORMATIONS["quantize_state"], switch, True, jnp.float32)
    # Operation by operation only what no other test has so: those that raise, and x64 (test_stage_composition).
    if switch not in ("all that raise", "jax_enable_x64"):
        runs(TRANSFORMATIONS["memory_optimized"], switch, False, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("jitted", [True, False], ids=["jitted", "eager"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("switch", [s for s in SWITCHES if s != "all that raise"])  # one by one here
def test_the_whole_matrix(switch: str, name: str, jitted: bool, dtype: Any) -> None:
    with_sgd = name.startswith(("clip", "suppress", "encourage"))
    if (switch, jitted) in OPTAX_FAILS and (with_sgd or name == "injected"):
        pytest.skip("what optax does around ours fails by itself")
    runs(TRANSFORMATIONS[name], switch, jitted, dtype, whole=True)
