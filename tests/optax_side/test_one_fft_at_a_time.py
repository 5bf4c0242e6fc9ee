"""No two FFTs of an update may run at one time: in some versions of XLA they can wait for each other for ever."""

from __future__ import annotations

import re
from functools import cache

import jax
import jax.numpy as jnp

from automagic_optax import suppress_high_frequencies

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
