"""How an array is divided into blocks (docs/algorithm.md, section 3.3)."""

from __future__ import annotations

import math

Shape = tuple[int, ...]


def absmax_shape(shape: Shape, block_size: int | None) -> Shape:
    """The shape of an array's absmax.

    Blocks inside the last axis keep the leading axes, so that the absmax can be sharded as the array is.

    Args:
        shape: the array's shape.
        block_size: elements per block, or None for one block of the whole array (``block_wise=False``).
    """
    if block_size is None:
        return (1,)
    if shape and shape[-1] % block_size == 0:
        return (*shape[:-1], shape[-1] // block_size)
    return (math.ceil(math.prod(shape) / block_size),)
