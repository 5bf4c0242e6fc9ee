"""JAX codes and scales equal the numpy oracle of section 3's exact rule, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from automagic_optax import QuantizedArray, quantize
from automagic_optax.codec.quantized_array import refined_reciprocal
from tests.optax_side.codec_samples import assert_as_oracle, borders, random_values, with_unit_absmax

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
SIZES = [1, 255, 256, 257, 4096]
BLOCKS = [64, 128, 256, 512, 1024, 2048, 4096, None]


def quantizer(signed: bool, block_size: int | None, jit: bool) -> Callable[[jax.Array], QuantizedArray]:
    plain = partial(quantize, signed=signed, block_size=block_size)
    return jax.jit(plain) if jit else plain


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("block_size", "jit"),
    [(64, True), (256, True), (256, False), pytest.param(4096, False, marks=pytest.mark.slow), (None, True)],
)
def test_every_midpoint_its_neighbours_and_every_value(block_size: int | None, signed: bool, jit: bool) -> None:
    unit = with_unit_absmax(borders(signed), block_size)
    run = quantizer(signed, block_size, jit)
    # A scale that is a power of two leaves every y exactly on its border; 3 and 0.7 round it.
    for scale in (1.0, 2.0**-40, 2.0**90, 3.0, 0.7):
        x = (unit * np.float32(scale)).astype(np.float32)
        assert_as_oracle(run(x), x, signed, block_size)
    stored = run(unit)
    if block_size is None:  # and independently of the oracle: a codebook value is its own code
        codes = np.asarray(stored.codes)[3 * 255 : 3 * 255 + 256]
        assert np.array_equal(codes, np.arange(256))


@pytest.mark.parametrize("count", [1_000_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("signed", [True, False])
def test_millions_of_random_values(signed: bool, count: int) -> None:
    x = random_values(count, signed, seed=1)
    assert_as_oracle(quantizer(signed, 256, jit=True)(x), x, signed, 256)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("size", SIZES)  # 100,003 is below, with every block size
def test_dtypes_and_sizes(dtype: type, size: int) -> None:
    signed = (size + DTYPES.index(dtype)) % 2 == 0  # in turn
    x = random_values(size, signed, seed=size).astype(dtype)
    assert_as_oracle(quantizer(signed, 256, jit=True)(jnp.asarray(x)), x, signed, 256)


# Every block size with every dtype or map in turn, compiled or operation by operation in turn.
CASES = [
    (block, signed, (i + 2 * signed) % 3, i % 3 != 1) for i, block in enumerate(BLOCKS) for signed in (True, False)
]


@pytest.mark.parametrize(
    ("block_size", "signed", "dtype", "jit"), [*CASES, (256, True, 1, True), (256, False, 1, True)]
)
def test_block_sizes_on_a_size_that_no_block_divides(
    block_size: int | None, signed: bool, dtype: int, jit: bool
) -> None:
    x = random_values(100_003, signed, seed=2).astype(DTYPES[dtype])
    assert_as_oracle(quantizer(signed, block_size, jit)(jnp.asarray(x)), x, signed, block_size)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize(
    ("block_size", "jit"), [(64, True), pytest.param(256, False, marks=pytest.mark.slow), (None, True)]
)
def test_every_half_precision_value(dtype: type, block_size: int | None, jit: bool) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    # XLA flushes subnormals to zero on a CPU: bfloat16's own (below 2⁻¹²⁶), and the reciprocal of a scale above 2¹²⁶.
    wide = np.abs(every.astype(np.float32))
    every = every[((wide >= 2.0**-126) & (wide <= 2.0**126)) | (wide == 0)]
    # As they come (blocks of one magnitude), and each beside larger ones.
    shuffled = np.random.default_rng(3).permutation(every[np.abs(every.astype(np.float32)) <= 1])
    both = np.concatenate([every, shuffled])
    for signed in (True, False):
        x = both if signed else np.abs(both)
        if block_size is None:  # all beside a scale of 1
            x = x[np.abs(x.astype(np.float32)) <= 1]
        assert_as_oracle(quantizer(signed, block_size, jit)(jnp.asarray(x)), x, signed, block_size)


@pytest.mark.parametrize("units", [-2, 0, 2])
def test_the_reciprocal_of_every_mantissa_from_an_estimate_some_units_off(units: int) -> None:
    x = np.arange(2**23, 2**24, dtype=np.uint32).astype(np.float32)
    exact = np.float32(1) / x
    estimate = (exact.view(np.int32) + np.int32(units)).view(np.float32)
    assert np.array_equal(jax.jit(refined_reciprocal)(x, estimate), exact)


def test_float64_is_read_as_float32() -> None:
    x = np.random.default_rng(4).standard_normal(1000)
    with jax.enable_x64(True):
        stored = jax.jit(quantize)(jnp.asarray(x, jnp.float64))
    assert_as_oracle(stored, x.astype(np.float32), True, 256)
