"""How an array is cut into blocks (section 3)."""

from __future__ import annotations

import math

Shape = tuple[int, ...]


def absmax_shape(shape: Shape, block_size: int | None) -> Shape:
    """Shape of the block scales (section 3).

    Blocks that lie inside the last axis keep the leading axes, so that a sharding of the array is one of its scales.

    Args:
        shape: the array's shape.
        block_size: elements per block, or None for one block of the whole array (``block_wise=False``).
    """
    if block_size is None:
        return (1,)
    if shape and shape[-1] % block_size == 0:
        return (*shape[:-1], shape[-1] // block_size)
    return (math.ceil(math.prod(shape) / block_size),)
