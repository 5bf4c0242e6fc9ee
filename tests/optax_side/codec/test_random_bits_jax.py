"""The random bits of section 3 are the same in numpy, in the oracle and in JAX."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from automagic_core import Slot
from automagic_core import mix32 as core_mix32
from automagic_core import random_unit as core_random_unit
from automagic_optax import mix32, random_unit
from tests.oracle import codec as oracle

SHAPES = [(), (1,), (1000,), (0,), (37, 41), (5, 6, 7), (3, 4, 5, 6), (513, 257)]
STEPS = [1, 2, 77, 2**24 + 1, 2**31 - 2, 2**31 - 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_random_unit_is_the_same_everywhere(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    compiled = jax.jit(random_unit, static_argnums=(1, 2))
    for slot in Slot:
        for step in STEPS:
            ours = np.asarray(compiled(jnp.int32(step), slot, shape))
            assert ours.dtype == np.float32
            assert ours.shape == shape
            # Row-major order, whatever the shape.
            assert np.array_equal(ours.ravel(), oracle.random_unit(step, int(slot), numel))
            assert np.array_equal(ours.ravel(), core_random_unit(step, slot, numel))


@pytest.mark.parametrize("step", [1, 2**31 - 1, jnp.int32(2**31 - 1), np.int64(5)])
def test_steps_of_every_kind(step) -> None:
    expected = oracle.random_unit(int(step), 2, 12)
    assert np.array_equal(np.asarray(random_unit(step, 2, (3, 4))).ravel(), expected)
    with jax.enable_x64(True):
        assert np.array_equal(np.asarray(random_unit(step, 2, (3, 4))).ravel(), expected)


def test_mix32_is_the_same_everywhere() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
    ours = np.asarray(mix32(jnp.asarray(words)))
    assert ours.dtype == np.uint32
    assert np.array_equal(ours, core_mix32(words))
    assert np.array_equal(ours, oracle.mix32(words))
