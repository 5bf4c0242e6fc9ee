"""An update computes array after array: memory, and FFTs that in some versions of XLA wait for each other for ever."""

from __future__ import annotations

import re
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from automagic_optax import automagic_8bit, suppress_high_frequencies

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
