"""With and without `jax_enable_x64`, and parameters of every width: the mathematics is float32."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_optax import automagic_8bit
from tests.optax_side.small import assert_same_bits, find_state, grads, params
from tests.oracle import codec as oracle

pytestmark = pytest.mark.compiled_quickly
FIELDS: dict[str, Any] = {"warmup_steps": 2, "weight_decay": 0.1, "torque_decay": 0.5}
TX = automagic_8bit(1e-3, **FIELDS)


def cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def dtypes(tree: Any) -> set[str]:
    return {str(x.dtype) for x in jax.tree.leaves(tree)}


def follow(dtype: str, steps: int = 3) -> tuple[Any, Any, Any]:
    """The last update, parameters and state of compiled steps on a dense layer."""
    update = jax.jit(TX.update)
    weights = cast(params()["dense"], dtype)
    state = TX.init(weights)
    for t in range(steps):
        updates, state = update(cast(grads(t)["dense"], dtype), state, weights)
        weights = optax.apply_updates(weights, updates)
    return updates, weights, state


def test_the_same_bits_with_and_without_x64() -> None:
    without = follow("float32")
    with jax.enable_x64(True):
        within = follow("float32")
        updates, weights, state = follow("float64", steps=1)
    assert_same_bits(within, without)
    assert dtypes(within[2]) == dtypes(state) == {"float32", "int32", "uint8"}
    # Parameters of float64 get the same float32 numbers in their own dtype, up to the roundings of another fusion.
    assert dtypes(updates) == dtypes(weights) == {"float64"}
    narrow, _, narrow_state = follow("float32", steps=1)
    for wide, single in zip(*map(jax.tree.leaves, ((updates, state), (narrow, narrow_state))), strict=True):
        if wide.dtype == np.uint8:
            assert np.mean(np.asarray(wide) != np.asarray(single)) < 1e-3
        else:
            # The FFT of stage 3 rounds relative to the largest numbers of an array.
            largest = float(np.abs(np.asarray(single)).max())
            np.testing.assert_allclose(wide, single, rtol=2e-6, atol=1e-12 + 2e-7 * largest)


@pytest.mark.slow
def test_x64_from_the_environment_and_under_jit() -> None:
    code = """
import jax, jax.numpy as jnp, optax
from automagic_optax import automagic_8bit
assert jnp.ones(1).dtype == jnp.float64
tx = automagic_8bit(optax.cosine_decay_schedule(1e-3, 10), warmup_steps=1)
weights = {"wide": jnp.ones((64, 64)), "narrow": jnp.ones(3, jnp.float32), "half": jnp.ones(5, jnp.bfloat16)}
state = tx.init(weights)
step = jax.jit(tx.update)
for _ in range(3):
    updates, state = step(jax.tree.map(lambda w: w * 0.5, weights), state, weights)
print(step._cache_size(), *(str(updates[name].dtype) for name in ("wide", "narrow", "half")))
print(sorted({str(x.dtype) for x in jax.tree.leaves(state)}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_ENABLE_X64": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines == ["1 float64 float32 float32", "['float32', 'int32', 'uint8']"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_parameters_get_the_exact_difference_of_the_rounded_parameter(dtype: str) -> None:
    # Mathematics in float32: the step before rounding is that of float32 copies of the same numbers.
    tx = inner = automagic_8bit(1e-3, weight_decay=0.1)
    weights = cast(params(), dtype)
    state, inner_state = tx.init(weights), inner.init(weights)
    for t in range(3):
        gradient = cast(grads(t), dtype)
        wide, inner_state = inner.update(cast(gradient, "float32"), inner_state, cast(weights, "float32"))
        updates, state = tx.update(gradient, state, weights)
        assert dtypes(updates) == {"float32"}
        assert_same_bits(find_state(state), find_state(inner_state))

        def check(w: jax.Array, u: jax.Array, step: jax.Array, t: int = t) -> jax.Array:
            target = np.asarray(w, np.float32) + np.asarray(step)
            rounded = oracle.round_stochastic_to(target, dtype, t + 1)
            new = optax.apply_updates(w, u)
            assert new.dtype == dtype
            assert np.asarray(new).tobytes() == rounded.tobytes()
            exact = np.asarray(w, np.float64) + np.asarray(u, np.float64)
            assert np.array_equal(exact, rounded.astype(np.float64))
            return new

        weights = jax.tree.map(check, weights, updates, wide)
    assert dtypes(state) == {"float32", "int32", "uint8"}


def test_rounding_to_nearest_on_request() -> None:
    tx = automagic_8bit(1e-3, warmup_steps=0, stochastic_rounding_params=False)
    inner = automagic_8bit(1e-3, warmup_steps=0)
    weights, gradient = cast(params(), "bfloat16"), cast(grads(), "bfloat16")
    updates = tx.update(gradient, tx.init(weights), weights)[0]
    single = cast(weights, "float32")
    wide = inner.update(cast(gradient, "float32"), inner.init(single), single)[0]
    new = optax.apply_updates(weights, updates)
    expected = jax.tree.map(lambda w, u: (w.astype(jnp.float32) + u).astype(jnp.bfloat16), weights, wide)
    assert_same_bits(new, expected)
    assert np.asarray(new["table"] != weights["table"]).any()


def test_gradients_may_have_another_dtype_than_parameters() -> None:
    exact = cast(cast(grads(), "bfloat16"), "float32")
    weights = params()
    expected = TX.update(exact, TX.init(weights), weights)
    assert_same_bits(TX.update(cast(exact, "bfloat16"), TX.init(weights), weights), expected)


def test_mixed_tree() -> None:
    every = params()
    weights = {"a": every["table"], "b": cast(every["dense"]["bias"], "bfloat16"), "c": cast(every["scale"], "float16")}
    updates, _ = TX.update(weights, TX.init(weights), weights)
    new = optax.apply_updates(weights, updates)
    assert {name: str(x.dtype) for name, x in new.items()} == {"a": "float32", "b": "bfloat16", "c": "float16"}
    assert {name: str(u.dtype) for name, u in updates.items()} == dict.fromkeys("abc", "float32")
    assert np.asarray(updates["a"]).any()
