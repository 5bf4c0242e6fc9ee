"""The numpy codec of files and layouts gives the bits of the JAX codec."""

import jax.numpy as jnp
import numpy as np
import pytest

from automagic_core import Slot, codebook_midpoints, dynamic_codebook, random_unit
from automagic_core.codec.numpy_codec import decode, encode
from automagic_optax import dequantize, quantize


def values(shape, signed):
    """Magnitudes over 30 powers of two, codebook values, ties between them, and a block of zeros.

    The ties stand in one block with a 1, since only an absmax of 1 leaves them ties.
    """
    rng = np.random.default_rng(0)
    size = int(np.prod(shape))
    x = rng.standard_normal(size) * np.exp2(-rng.integers(0, 30, size))
    special = np.concatenate([codebook_midpoints(signed), [1.0], dynamic_codebook(signed)])
    x[: min(size, 512)] = special[: min(size, 512)]
    x[1024:1536] = 0
    x[-3:] = 1e-40
    return (x if signed else np.abs(x)).astype(np.float32).reshape(shape)


# Each case compiles the JAX codec once more: one for each kind of blocks, codebook and rounding, not every pair.
CASES = [
    ((8, 512), 256, True, True),
    ((5, 7, 61), 64, False, True),
    pytest.param((8, 512), 256, False, True, marks=pytest.mark.slow),
    ((5, 7, 61), None, True, False),
    pytest.param((), 256, False, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "block_size", "signed", "stochastic"), CASES)
def test_bit_for_bit(shape, block_size, signed, stochastic):
    x = values(shape, signed)
    random = random_unit(7, Slot.exp_avg, x.size) if stochastic else None
    codes, absmax = encode(x, signed, block_size, random)
    r = jnp.array(random.reshape(shape)) if stochastic else None
    expected = quantize(jnp.array(x), signed=signed, block_size=block_size, random=r)
    np.testing.assert_array_equal(codes, expected.codes)
    np.testing.assert_array_equal(absmax, expected.absmax)
    read = decode(codes, absmax, signed, block_size)
    np.testing.assert_array_equal(read, dequantize(expected))
    assert (read.dtype, read.shape, codes.dtype, absmax.dtype) == (np.float32, shape, np.uint8, np.float32)
