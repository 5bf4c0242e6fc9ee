"""Values that are hard for a codec, and comparisons with the oracle's exact rule."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from automagic_optax import QuantizedArray, dequantize
from tests.oracle import codec as oracle

F32 = NDArray[np.float32]
_read = jax.jit(dequantize)  # one compilation for each shape instead of one for each operation


def borders(signed: bool) -> F32:
    """Every midpoint and its two float neighbours, every codebook value, zeros of both signs, the ends of the map."""
    middle, values = oracle.midpoints(signed), oracle.codebook(signed)
    near = [middle, np.nextafter(middle, np.float32(-2)), np.nextafter(middle, np.float32(2)), values]
    # The smallest normal float32; XLA flushes what is below it to zero on a CPU.
    ends = np.array([0.0, -0.0, 1.0, -1.0 if signed else 1.0, 2.0**-126, 0.9999999], np.float32)
    found = np.concatenate([*near, ends])
    return found[np.abs(found) <= 1]


def with_unit_absmax(y: F32, block_size: int | None) -> F32:
    """The values laid out so that every block holds a 1: they are then their own normalized values."""
    if block_size is None:
        return np.append(y, np.float32(1))
    body = block_size - 1
    padded = np.zeros(-(-y.size // body) * body, np.float32)
    padded[: y.size] = y
    rows = padded.reshape(-1, body)
    return np.concatenate([np.ones((len(rows), 1), np.float32), rows], axis=1).reshape(-1)


def random_values(n: int, signed: bool, seed: int) -> F32:
    """A mixture over the float32 range: normal, uniform and log-uniform, with some exact zeros."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 8, n, dtype=np.uint8)
    x = rng.standard_normal(n, dtype=np.float32)
    x = np.where(kind < 2, x * np.exp2(rng.uniform(-30, 2, n).astype(np.float32)), x)
    x = np.where(kind == 2, rng.uniform(-1, 1, n).astype(np.float32), x)
    x = np.where(kind == 3, np.float32(0), x).astype(np.float32)
    return x if signed else np.abs(x)


def assert_stored(stored: QuantizedArray, codes: Any, absmax: Any) -> None:
    """Codes and scales are the given ones, bit for bit."""
    assert stored.codes.dtype == np.uint8
    assert stored.absmax.dtype == np.float32
    different = np.flatnonzero(np.asarray(stored.codes) != codes)
    assert different.size == 0, f"{different.size} codes differ, first at {different[:5]}"
    assert np.array_equal(np.asarray(stored.absmax).ravel().view(np.uint32), absmax.view(np.uint32))


def assert_as_oracle(stored: QuantizedArray, x: Any, signed: bool, block_size: int | None) -> None:
    """The stored form of x is the oracle's, bit for bit, and reads back as the oracle's."""
    x = np.asarray(x).astype(np.float32)
    codes, absmax = oracle.quantize(x, signed, block_size)
    assert_stored(stored, codes, absmax)
    assert stored.codes.shape == x.shape
    assert stored.absmax.shape == oracle.absmax_shape(x.shape, block_size)
    read = np.asarray(_read(stored))
    assert read.dtype == np.float32
    expected = oracle.dequantize(codes, absmax, signed, block_size)
    assert np.array_equal(read.view(np.uint32), expected.view(np.uint32))
