"""Section 3 of ALGORITHM.md (and "Low-precision parameters" of section 5), exact, in float32 numpy."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]

TINY_ABSMAX = np.float32(2.0**-120)  # a block below this counts as a block of zeros
SLOT_PARAMETERS = 4


# ---------------------------------------------------------------- codebook and nearest code


@functools.lru_cache(maxsize=2)
def codebook(signed: bool) -> F32:
    """The 256 values, ascending, as bitsandbytes makes them."""
    from bitsandbytes.functional import create_dynamic_map

    values = create_dynamic_map(signed=signed).numpy().astype(np.float32)
    assert values.shape == (256,)
    assert np.all(np.diff(values) > 0)
    values.setflags(write=False)
    return values


@functools.lru_cache(maxsize=2)
def midpoints(signed: bool) -> F32:
    """m[k] lies between code k and code k + 1; sum and product are both float32."""
    c = codebook(signed)
    m = np.float32(0.5) * (c[:-1] + c[1:])
    assert m.dtype == np.float32
    assert np.all(np.diff(m) > 0)
    m.setflags(write=False)
    return m


def nearest(y: Any, signed: bool) -> U8:
    """Code of the nearest codebook value; a tie goes to the even code."""
    y = np.asarray(y, dtype=np.float32)
    m = midpoints(signed)
    k = np.searchsorted(m, y, side="left")  # m[k-1] < y <= m[k]: a tie is still on its lower code
    tie = (k < 255) & (y == m[np.minimum(k, 254)])
    k = k + (tie & (k % 2 == 1))
    return k.astype(np.uint8)


# ---------------------------------------------------------------- blocks


def _block_length(size: int, block_size: int | None) -> int:
    return max(size, 1) if block_size is None else block_size


def absmax_shape(shape: tuple[int, ...], block_size: int | None) -> tuple[int, ...]:
    """Shape in which the packages keep absmax; its row-major order is the order of the blocks."""
    if block_size is None:
        return (1,)
    if len(shape) > 0 and shape[-1] % block_size == 0:
        return (*shape[:-1], shape[-1] // block_size)
    return (math.ceil(math.prod(shape) / block_size),)


def _per_element(per_block: F32, size: int, block_size: int | None) -> F32:
    return np.repeat(per_block, _block_length(size, block_size))[:size]


def block_absmax(x: Any, block_size: int | None) -> F32:
    """One float32 per block, 0 where the block counts as zeros; the last block may be short."""
    flat = np.abs(np.asarray(x, dtype=np.float32).reshape(-1))
    length = _block_length(flat.size, block_size)
    n_blocks = 1 if block_size is None else math.ceil(flat.size / length)
    padded = np.zeros(n_blocks * length, dtype=np.float32)  # a zero never raises a maximum of magnitudes
    padded[: flat.size] = flat
    absmax = padded.reshape(n_blocks, length).max(axis=1)
    return np.where(absmax < TINY_ABSMAX, np.float32(0), absmax)


def _scaled(x: F32, absmax: F32, block_size: int | None) -> tuple[F32, NDArray[np.bool_]]:
    """y = x * (1 / absmax), flat, and which elements are in a block that is not zeros."""
    flat = x.reshape(-1)
    live_block = absmax > 0
    # A float32 reciprocal and then a product, not a division: they round differently.
    reciprocal = (np.float32(1) / np.where(live_block, absmax, np.float32(1))).astype(np.float32)
    live = np.repeat(live_block, _block_length(flat.size, block_size))[: flat.size]
    y = np.where(live, flat * _per_element(reciprocal, flat.size, block_size), np.float32(0))
    assert y.dtype == np.float32
    return y, live


def quantize(x: Any, signed: bool, block_size: int | None = 256) -> tuple[U8, F32]:
    """Codes in the shape of x and flat absmax. block_size None: one block of the whole array."""
    x = np.asarray(x, dtype=np.float32)
    absmax = block_absmax(x, block_size)
    y, live = _scaled(x, absmax, block_size)
    codes = np.where(live, nearest(y, signed), np.uint8(0))
    return codes.reshape(x.shape), absmax


def dequantize(codes: U8, absmax: Any, signed: bool, block_size: int | None = 256) -> F32:
    """codebook[code] * absmax. A zero block of the signed map reads back as -0.0 (code 0 is negative)."""
    flat_absmax = np.asarray(absmax, dtype=np.float32).reshape(-1)
    values = codebook(signed)[codes.reshape(-1)] * _per_element(flat_absmax, codes.size, block_size)
    assert values.dtype == np.float32
    return values.reshape(codes.shape)


# ---------------------------------------------------------------- random bits and stochastic rounding


def mix32(x: Any) -> U32:
    """The page's integer mixer, modulo 2**32 (numpy's unsigned array arithmetic wraps)."""
    x = np.array(x, dtype=np.uint32, ndmin=1)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def random_unit(step: int, slot: int, numel: int, index: Any = None) -> F32:
    """r in [0, 1) for elements `index` (default: all) of an array of numel elements."""
    seed = (step * 0x9E3779B9 + slot * 0x85EBCA6B + numel) % 2**32  # exact in Python integers
    key = mix32(np.uint32(seed))
    i = np.arange(numel, dtype=np.uint64) if index is None else np.asarray(index, dtype=np.uint64)
    bits = mix32((i % np.uint64(2**32)).astype(np.uint32) + key)
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def quantize_stochastic(x: Any, signed: bool, block_size: int | None, step: int, slot: int) -> tuple[U8, F32]:
    """Like quantize, then each code moves to the neighbour beyond the value with probability p."""
    x = np.asarray(x, dtype=np.float32)
    absmax = block_absmax(x, block_size)
    y, live = _scaled(x, absmax, block_size)
    c = codebook(signed)
    k = nearest(y, signed).astype(np.int64)
    e = y - c[k]
    neighbour = np.clip(k + np.sign(e).astype(np.int64), 0, 255)
    gap = np.abs(c[neighbour] - c[k])
    movable = live & (neighbour != k)
    p = np.minimum(np.float32(1), np.abs(e) / np.where(movable, gap, np.float32(1)))
    assert p.dtype == np.float32
    move = movable & (random_unit(step, slot, x.size) < p)
    codes = np.where(live, np.where(move, neighbour, k), 0).astype(np.uint8)
    return codes.reshape(x.shape), absmax


def round_stochastic_to(x: Any, dtype: str, step: int) -> NDArray[Any]:
    """Round float32 parameters to 'bfloat16' or 'float16' with the bits of slot 4.

    lo is x rounded toward zero in dtype, hi the next value away from zero; hi is taken when
    r < (|x| - |lo|) / (|hi| - |lo|). A finite x stays finite: beyond the largest finite value it is that
    value. Zero keeps its sign; infinities and NaN pass through.
    """
    import ml_dtypes

    target = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}[dtype]
    x = np.asarray(x, dtype=np.float32)
    flat = x.reshape(-1)
    finite = np.isfinite(flat)
    magnitude = np.where(finite, np.abs(flat), np.float32(0))
    with np.errstate(over="ignore"):
        cast = magnitude.astype(target)
    # The bit patterns of non-negative floats are ordered, so +-1 is the next value. A cast to nearest is
    # lo or hi; where it overshot (perhaps to infinity), one step down is lo.
    lo_bits = cast.view(np.uint16) - (cast.astype(np.float32) > magnitude).astype(np.uint16)
    hi_bits = lo_bits + np.uint16(1)
    # Both differences and their ratio (by a power of two) are exact; float64 only spares the question.
    lo = lo_bits.view(target).astype(np.float64)
    hi = hi_bits.view(target).astype(np.float64)
    fraction = (magnitude.astype(np.float64) - lo) / (hi - lo)
    take_hi = np.isfinite(hi) & (random_unit(step, SLOT_PARAMETERS, flat.size) < fraction)
    bits = np.where(take_hi, hi_bits, lo_bits)
    bits = bits | np.where(np.signbit(flat), np.uint16(0x8000), np.uint16(0))
    rounded = bits.astype(np.uint16).view(target)
    rounded[~finite] = flat[~finite].astype(target)
    return rounded.reshape(x.shape)
