"""Where no stage changes an array, the optimizer with stages is the one without them, and as cheap."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from automagic_optax import SuppressEdgesState, automagic_8bit
from tests.optax_side.small import assert_same_bits, find_state

pytestmark = pytest.mark.compiled_quickly
SHAPES = {"a": (16, 96), "b": (16, 96), "c": (40,), "d": ()}
FIELDS: dict[str, Any] = {"profile": "balanced", "min_8bit_size": 64, "warmup_steps": 3}
ON, OFF = (
    automagic_8bit(1e-3, **FIELDS, **more) for more in ({}, {"edge_suppression": False, "frequency_penalty": 0.0})
)
BAD = {"a": np.nan, "c": np.inf, "d": 1.01e15}


def trees(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def run(tx: Any, shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[Any, Any]:
    weights = trees(0, shapes)
    state, update = tx.init(weights), jax.jit(tx.update)
    for step in range(4):
        grads = trees(step + 1, shapes)
        if step == 2:
            grads |= {name: grads[name].at[(0,) * grads[name].ndim].set(value) for name, value in BAD.items()}
        updates, state = update(grads, state, weights)
        weights = jax.tree.map(jnp.add, weights, updates)
    return weights, state


def energy_removed(state: Any) -> Any:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SuppressEdgesState))
    return next(x.energy_removed for x in leaves if isinstance(x, SuppressEdgesState))


def test_every_bit_and_every_skip_are_those_without_stages() -> None:
    (weights, state), (expected, bare) = run(ON), run(OFF)
    assert_same_bits(weights, expected)
    assert_same_bits(find_state(state), find_state(bare))
    skipped = {name: int(count) for name, count in find_state(state).skipped_steps.items()}
    assert skipped == {name: int(name in BAD) for name in SHAPES}
    assert energy_removed(state) == 0


def test_nothing_more_is_computed() -> None:
    def operations(tx: Any) -> int:
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
        return jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).as_text().count("stablehlo.")

    assert operations(ON) == operations(OFF)


def test_beside_a_kernel_the_same_arrays_are_skipped() -> None:
    _, state = run(ON, SHAPES | {"kernel": (3, 3, 4, 8)})
    skipped = {name: int(count) for name, count in find_state(state).skipped_steps.items()}
    assert skipped == {name: int(name in BAD) for name in (*SHAPES, "kernel")}
    assert energy_removed(state) != 0
