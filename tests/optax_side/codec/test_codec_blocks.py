"""Blocks: shapes of the scales, short and zero and tiny blocks, and no memory but the result's."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from automagic_core import absmax_shape
from automagic_optax import QuantizedArray, dequantize, quantize, random_unit
from tests.optax_side.codec_samples import assert_as_oracle, random_values

SHAPES = [(), (1,), (0,), (5, 0), (0, 256), (300,), (256,), (3, 256), (256, 3), (2, 3, 512), (7, 64), (2, 2, 2, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [256, None])
def test_shapes(shape: tuple[int, ...], block_size: int | None) -> None:
    x = random_values(int(np.prod(shape)), True, seed=5).reshape(shape)
    stored = jax.jit(partial(quantize, block_size=block_size))(x)
    assert stored.shape == stored.codes.shape == shape
    assert stored.size == x.size
    assert stored.absmax.shape == absmax_shape(shape, block_size)
    assert_as_oracle(stored, x, True, block_size)


def test_a_block_of_zeros_has_scale_and_codes_zero() -> None:
    x = np.zeros(256 * 3 + 10, np.float32)
    x[300] = -2.0
    stored = quantize(x)
    assert stored.absmax.tolist() == [0, 2, 0, 0]
    codes = np.asarray(stored.codes)
    assert not codes[:256].any()
    assert not codes[512:].any()
    assert codes[300] == 0  # −1 rounds to the map's end
    assert np.all(codes[256:300] == 127)
    assert np.all(np.signbit(np.asarray(stored.dequantize())[:256]))  # −0.993 · 0 in the signed map
    assert not np.signbit(np.asarray(quantize(x * 0, signed=False).dequantize())).any()
    # Also where rounding is stochastic.
    random = quantize(x, random=random_unit(1, 0, x.shape))
    assert not np.asarray(random.codes)[:256].any()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("jit", [False, True])
def test_tiny_blocks(signed: bool, jit: bool) -> None:
    limit = np.float32(2.0**-120)
    rng = np.random.default_rng(6)
    sizes = [np.nextafter(limit, np.float32(0)), limit, np.nextafter(limit, np.float32(1)), limit / 2, limit * 3]
    sizes += [np.float32(2.0**-125), np.float32(2.0**-119), np.float32(2.0**-100), np.float32(2.0**126)]
    rows = rng.uniform(-1 if signed else 0, 1, (len(sizes), 256)).astype(np.float32)
    rows[:, 0] = 1
    x = (rows * np.array(sizes, np.float32)[:, None]).ravel()
    # XLA on a CPU reads subnormals as zeros, so an element below 2⁻¹²⁶ may have the code of zero: leave those out.
    # (For the same reason 2¹²⁶ is the largest scale here: above it the reciprocal is subnormal.)
    x[np.abs(x) < 2.0**-126] = 0
    run = partial(quantize, signed=signed)
    stored = (jax.jit(run) if jit else run)(x)
    assert_as_oracle(stored, x, signed, 256)
    below = np.array(sizes) < limit
    assert below.tolist() == [True, False, False, True, False, True, False, False, False]
    assert np.array_equal(np.asarray(stored.absmax) == 0, below)


def test_dequantize_is_the_method() -> None:
    stored = quantize(random_values(300, True, seed=6))
    assert np.array_equal(dequantize(stored), stored.dequantize())


def test_a_stored_array_is_a_tree_of_two_leaves() -> None:
    stored = quantize(jnp.ones((3, 256)), signed=False)
    assert len(jax.tree.leaves(stored)) == 2
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(stored)]
    assert paths == [".codes", ".absmax"]
    mapped = jax.tree.map(lambda x: x, stored)
    assert isinstance(mapped, QuantizedArray)
    assert (mapped.signed, mapped.block_size) == (False, 256)


@pytest.mark.parametrize("signed", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stochastic", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("block_size", [256, None])
def test_memory_of_a_compiled_quantize(signed: bool, stochastic: bool, block_size: int | None) -> None:
    shape = (1024, 1024)
    n = 2**20

    def run(x: jax.Array, step: jax.Array) -> QuantizedArray:
        random = random_unit(step, 0, x.shape) if stochastic else None
        return quantize(x, signed=signed, block_size=block_size, random=random)

    compiled = jax.jit(run).lower(jnp.zeros(shape), jnp.int32(1)).compile()
    # One float32 intermediate is 4 bytes an element; a 255-way comparison would need at least 255.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * n
    elements = [
        int(np.prod([int(length) for length in dims.split(",")], dtype=np.int64))
        for dims in re.findall(r"\b(?:pred|[sufb]+\d+)\[([\d,]+)\]", compiled.as_text())
    ]
    assert max(elements) == n  # the largest array anywhere in the program, inside fusions too


def test_memory_of_a_compiled_dequantize() -> None:
    stored = quantize(jnp.ones((1024, 1024)))
    compiled = jax.jit(dequantize).lower(stored).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2**20
