"""The 8-bit codec in numpy, for states that change their form between two runs (docs/algorithm.md, section 3)."""

from __future__ import annotations

import math

import numpy as np

from automagic_core.codec.blocks import absmax_shape
from automagic_core.codec.codebook import codebook_midpoints, dynamic_codebook
from automagic_core.config.constants import MIN_ABSMAX


def decode(codes: np.ndarray, absmax: np.ndarray, signed: bool, block_size: int | None) -> np.ndarray:
    """Reads codes as codebook · absmax.  It does not square companded states: the caller does.

    Args:
        codes: uint8, of any shape.
        absmax: float32, in the shape that `absmax_shape` gives.
        signed: whether the codebook is signed.
        block_size: elements per block in row-major order, or None for one block of the whole array.

    Returns:
        float32 array in the shape of `codes`.
    """
    per_element = np.repeat(absmax.reshape(-1), _width(codes.size, block_size))[: codes.size]
    values: np.ndarray = dynamic_codebook(signed)[codes] * per_element.reshape(codes.shape)
    return values


def encode(
    x: np.ndarray, signed: bool, block_size: int | None, random: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Stores an array in 8 bits.

    Args:
        x: finite float32 array of any shape; negative values need the signed codebook.
        signed, block_size: as for `decode`.
        random: r in [0, 1) for each element in row-major order, float32 (size,), for stochastic rounding; None rounds
            to the nearest code.

    Returns:
        Codes, uint8 in the shape of x, and absmax, float32 in the shape that `absmax_shape` gives.
    """
    width = _width(x.size, block_size)
    count = math.prod(absmax_shape(x.shape, block_size))
    blocks = np.zeros((count, width), np.float32)
    blocks.reshape(-1)[: x.size] = x.reshape(-1)
    absmax = np.abs(blocks).max(axis=1)
    absmax = np.where(absmax < np.float32(MIN_ABSMAX), np.float32(0), absmax)
    is_zero = absmax == 0
    inverse = np.where(is_zero, np.float32(0), np.float32(1) / np.where(is_zero, np.float32(1), absmax))
    y = (blocks * inverse[:, None]).reshape(-1)[: x.size]
    codes = _nearest(y, signed)
    if random is not None:
        codes = _moved_to_neighbour(y, codes, signed, random)
    codes = np.where(np.repeat(is_zero, width)[: x.size], 0, codes)
    return codes.astype(np.uint8).reshape(x.shape), absmax.reshape(absmax_shape(x.shape, block_size))


def _width(size: int, block_size: int | None) -> int:
    return block_size or max(size, 1)


def _nearest(y: np.ndarray, signed: bool) -> np.ndarray:
    midpoints = codebook_midpoints(signed)
    code: np.ndarray = np.searchsorted(midpoints, y, side="left")
    # The search decides a tie for the lower code; the rule is the even one.
    above = np.append(midpoints, np.float32(np.inf))
    code += (code % 2 == 1) & (y == above[code])
    return code


def _moved_to_neighbour(y: np.ndarray, codes: np.ndarray, signed: bool, random: np.ndarray) -> np.ndarray:
    """Rounds stochastically: moves a code to the neighbour on the side of y with probability |error| / gap."""
    values = dynamic_codebook(signed)
    error = y - values[codes]
    neighbour = np.clip(codes + np.sign(error).astype(np.int64), 0, 255)
    gap = np.abs(values[neighbour] - values[codes])
    # At an end of the codebook the neighbour is the code itself.
    stays = gap == 0
    chance = np.abs(error) / np.where(stays, np.float32(1), gap)
    return np.where(~stays & (random < chance), neighbour, codes)
