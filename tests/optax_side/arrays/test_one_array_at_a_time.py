"""An update computes array after array: memory, and FFTs that in some versions of XLA wait for each other for ever."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from automagic_optax import automagic_8bit, quantize_state, suppress_high_frequencies

SHAPES = [(8, 8), (8, 9), (9, 8), (5,), (10, 10), (3, 3, 2, 2)]


def test_each_fft_needs_the_one_before() -> None:
    # The order is read from the program that XLA has optimized.
    params = [jnp.ones(SHAPES[i % len(SHAPES)]) for i in range(22)]
    tx = suppress_high_frequencies(0.1)
    compiled = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()
    entry = compiled[compiled.index("\nENTRY") :]
    operations = {
        name: (kind, re.findall(r"%([\w.\-]+)", operands))
        for name, kind, operands in re.findall(r"%([\w.\-]+) = .*? ([a-z\-]+)\((.*)", entry)
    }

    @cache
    def needed(name: str) -> frozenset[str]:
        direct = operations[name][1] if name in operations else []
        return frozenset(direct).union(*map(needed, direct))

    ffts = [name for name, (kind, _) in operations.items() if kind == "fft"]
    # Three batches of four, twice three arrays that are too few for one, and vectors without; there and back.
    assert len(ffts) == 2 * (3 + 2 * 3)
    assert sorted(len(needed(fft) & set(ffts)) for fft in ffts) == list(range(len(ffts)))


@pytest.mark.slow
def test_one_array_in_memory_at_a_time() -> None:
    # With all stages on; each array has more elements than a batch takes.
    tx = automagic_8bit(1e-3, percentile_clipping=95)
    size = 4 * 520 * 520

    def temporary(count: int) -> int:
        params = [jax.ShapeDtypeStruct((520, 520), jnp.float32)] * count
        state = jax.eval_shape(tx.init, params)
        compiled = jax.jit(tx.update, donate_argnums=(1,)).lower(params, state, params).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    few, more = temporary(2), temporary(4)
    assert size < few < 12 * size
    assert more < few + size / 2


@pytest.mark.parametrize(
    ("tx", "given"),
    [
        (automagic_8bit(1e-3, profile="balanced", warmup_steps=0), False),
        pytest.param(quantize_state(optax.adamw(1e-3)), True, marks=pytest.mark.slow),  # as in tests of moments
        pytest.param(automagic_8bit(1e-3, profile="balanced", warmup_steps=0), True, marks=pytest.mark.slow),
        pytest.param(quantize_state(optax.adamw(1e-3)), False, marks=pytest.mark.slow),
    ],
    ids=["computed", "quantize_state, given", "given", "quantize_state, computed"],
)
def test_temporary_memory_beyond_the_gradients_does_not_grow_with_the_arrays(tx: Any, given: bool) -> None:
    def beyond(count: int) -> int:
        weights = [jax.ShapeDtypeStruct((1024, 512 + 256 * (i % 2)), jnp.float32) for i in range(count)]

        def step(weights: Any, state: Any, grads: Any) -> Any:
            grads = grads if given else jax.tree.map(lambda w: jnp.cumsum(w, 0), weights)
            updates, state = tx.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state

        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(weights, jax.eval_shape(tx.init, weights), weights)
        held = int(lowered.compile().memory_analysis().temp_size_in_bytes)
        return held if given else held - 4 * sum(x.size for x in weights)

    # Some given gradients wait as copies: with three arrays all that ever do.
    few, more = (4, 6) if given else (1, 3)
    assert beyond(more) < beyond(few) + 4 * 1024 * 512
