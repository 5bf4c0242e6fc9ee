"""Random numbers that are computed from counters, without a generator (docs/algorithm.md, section 3.7).

Both frameworks and every mesh therefore draw the same numbers.  A number is a function of the step, the slot of the
state that is rounded, the size of the array, and the row-major index of the element in the whole array.
"""

from __future__ import annotations

import enum

import numpy as np

STEP_MULTIPLIER = 0x9E3779B9
SLOT_MULTIPLIER = 0x85EBCA6B
MIX_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


class Slot(enum.IntEnum):
    """A number for each thing that needs random bits of its own.

    Slots from 5 on also belong to `quantize_state`.  Its bits are those of steps from 1 on, and the signs of the walk
    have step 0.
    """

    exp_avg = 0
    exp_avg_sq = 1
    exp_avg_res = 2
    s = 3
    parameters = 4
    walk = 5


def mix32(x: np.ndarray | int) -> np.ndarray:
    """Scrambles 32-bit words: every input bit flips about half of the output bits.

    Args:
        x: unsigned integers of any shape, taken modulo 2³².

    Returns:
        uint32 array of the same shape.
    """
    with np.errstate(over="ignore"):
        bits: np.ndarray = np.asarray(np.asarray(x, dtype=np.uint64) & np.uint64(0xFFFFFFFF), dtype=np.uint32)
        bits = np.asarray(bits ^ (bits >> np.uint32(16)))
        bits = np.asarray(bits * np.uint32(MIX_MULTIPLIERS[0]))
        bits = np.asarray(bits ^ (bits >> np.uint32(15)))
        bits = np.asarray(bits * np.uint32(MIX_MULTIPLIERS[1]))
        return np.asarray(bits ^ (bits >> np.uint32(16)))


def rounding_key(step: int, slot: int, numel: int) -> int:
    """The key of one array's random bits in one step: an unsigned 32-bit integer.

    Args:
        step: t ≥ 1, the number of calls of the optimizer; 0 for the signs of the walk.
        slot: one of `Slot`.
        numel: number of elements of the whole, unsharded array.
    """
    return int(mix32((step * STEP_MULTIPLIER + slot * SLOT_MULTIPLIER + numel) % 2**32))


def walk_signs(numel: int, index: np.ndarray | None = None) -> np.ndarray:
    """The signs σ of the walk (section 5.8), the same at every step: int8, −1 or 1, in the shape of `index`.

    Args:
        numel, index: as in `random_unit`.
    """
    index = np.arange(numel, dtype=np.uint64) if index is None else np.asarray(index, dtype=np.uint64)
    bits = mix32(index + np.uint64(rounding_key(0, Slot.walk, numel)))
    return 1 - 2 * (bits >> np.uint32(31)).astype(np.int8)


def random_unit(step: int, slot: int, numel: int, index: np.ndarray | None = None) -> np.ndarray:
    """Random numbers r in [0, 1) with 24 bits, one per element.

    Args:
        step, slot, numel: as in `rounding_key`.
        index: row-major element indices of any shape; by default all of them, ``arange(numel)``.

    Returns:
        float32 array in the shape of `index`.
    """
    index = np.arange(numel, dtype=np.uint64) if index is None else np.asarray(index, dtype=np.uint64)
    bits = mix32(index + np.uint64(rounding_key(step, slot, numel)))
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
