"""The rounding rule of the CPU block-wise 8-bit kernel of bitsandbytes 0.50.2, in plain numpy float32.

Source of the rule: the machine code of `quantize_blockwise` for float32 in the Linux x86-64 wheel of that
version, read instruction by instruction and then compared with it over every float32 in [-1, 1]. Words:

1. absmax[b] is the largest |x| of block b. NaNs are skipped; the last block may be short.
2. A block with absmax 0 gets code 0 everywhere, not the code of the value zero.
3. Else `y = x * (1 / absmax)`: one rounded division a block, one rounded product a value; then a clamp to
   [-1, 1]. A quotient `x / absmax` is not the same thing.
4. `index = int((y + 1) * 32767.5 + 0.5)`, all in float32, cut towards zero, 0..65535; a NaN y gets index 0.
5. `code = table[index]`. The table holds the nearest code to each of 65,536 grid points of [-1, 1] (for the
   unsigned map too); the points and the midpoints of the codebook are rounded to float32, and a grid point
   that equals a midpoint takes the lower code.

The kernel's one path is scalar, so neither the block size nor the place in the block changes a value. It has
an FMA in step 4; over all sums y + 1 that float32 allows, separate rounding gives the same index. Denormals
count as numbers. Where a runtime flushes them to zero, the rule still holds for 2**-101 <= absmax <= 2**126.
Other processors and other versions of that library may round otherwise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GRID_POINTS = 65536

F32Array = NDArray[np.float32]
U8Array = NDArray[np.uint8]

_ONE = np.float32(1.0)
_HALF = np.float32(0.5)


def cpu_grid_table(signed: bool, codebook: F32Array) -> U8Array:
    """Code at every grid point: uint8[65536].

    codebook: float32[256], ascending. The table follows from the codebook alone; `signed` says which map the
    caller means, and a codebook of the other kind is refused.
    """
    book = np.asarray(codebook, dtype=np.float32)
    if book.shape != (256,) or not np.all(book[:-1] <= book[1:]):
        raise ValueError("the codebook must be 256 ascending float32 values")
    if signed != bool(book[0] < 0):
        raise ValueError(f"signed={signed}, but the codebook starts at {book[0]}")
    # Each operation below rounds to float32, as in the kernel; in float64 one unsigned entry would differ.
    midpoints = _HALF * (book[:-1] + book[1:])
    doubled = np.arange(GRID_POINTS, dtype=np.float32) * np.float32(2.0)
    points = doubled / np.float32(GRID_POINTS - 1) - _ONE
    return np.searchsorted(midpoints, points, side="left").astype(np.uint8)


def cpu_grid_index(y: F32Array) -> NDArray[np.int32]:
    """Index on the grid of the scaled values y: int32 in 0..65535, any shape, the same as y's.

    Three float32 operations, then a cut towards zero. The sum with 0.5 rounds too, by up to 1/512 near the
    top: that is why `rint((y + 1) * 32767.5)`, or float64, gives another index for one sum in a thousand.
    Whether a compiler contracts the product and the sum to an FMA does not matter: the index is the same.
    """
    s = np.clip(np.asarray(y, dtype=np.float32), -_ONE, _ONE) + _ONE
    position = s * np.float32(32767.5) + _HALF
    return np.where(np.isnan(position), np.float32(0.0), position).astype(np.int32)


def cpu_code_borders(codebook: F32Array) -> F32Array:
    """The rule as 255 borders, float32[255]: code = number of borders <= y, for y clamped and not NaN.

    Border c is the least float32 y in [-1, 1] whose code is above c (inf if there is none). Index and table
    both never fall as y grows, so the borders say all of steps 4 and 5; `searchsorted(borders, y, "right")`
    needs no table of 65,536 entries.
    """
    table = cpu_grid_table(bool(codebook[0] < 0), codebook)
    # Bisection over the ranks of the float32 values in order, see _float_at.
    top = int(_ONE.view(np.int32))
    low = np.full(255, -top - 1, dtype=np.int64)  # "code <= c" holds here (by convention just below -1)
    high = np.full(255, top + 1, dtype=np.int64)  # "code > c" holds here (by convention just above 1)
    wanted = np.arange(255)
    while np.any(high - low > 1):
        middle = (low + high) // 2
        above = table[cpu_grid_index(_float_at(middle))] > wanted
        high = np.where(above, middle, high)
        low = np.where(above, low, middle)
    borders = _float_at(high)
    return np.where(high > top, np.float32(np.inf), borders)


def _float_at(order: NDArray[np.int64]) -> F32Array:
    """Float32 of each signed rank around zero; same shape. Rank n has the bits of |n| and the sign of n."""
    size = np.abs(order).astype(np.int32).view(np.float32)
    return np.where(order < 0, -size, size)


def quantize_cpu_rule(x: F32Array, codebook: F32Array, block_size: int) -> tuple[U8Array, F32Array]:
    """Codes and scales as the CPU kernel writes them.

    x: float32, any shape, read in C order in blocks of block_size values, the last one possibly short.
    codebook: float32[256], ascending. Returns codes uint8 of x's shape and absmax float32[number of blocks].
    """
    if block_size <= 0:
        raise ValueError(f"block_size must be positive, got {block_size}")
    values = np.asarray(x, dtype=np.float32)
    flat = values.reshape(-1)
    blocks = -(-flat.size // block_size)
    padded = np.zeros(blocks * block_size, dtype=np.float32)
    padded[: flat.size] = flat
    rows = padded.reshape(blocks, block_size)
    absmax = np.fmax.reduce(np.abs(rows), axis=1, initial=np.float32(0.0))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore", under="ignore"):
        y = rows * (_ONE / absmax)[:, None]  # below about 2.9e-39 the reciprocal is inf, and 0 * inf is NaN
    table = cpu_grid_table(bool(codebook[0] < 0), codebook)
    codes = np.where(absmax[:, None] == 0, np.uint8(0), table[cpu_grid_index(y)])
    return codes.reshape(-1)[: flat.size].reshape(values.shape), absmax
