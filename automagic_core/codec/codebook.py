"""The signed and the unsigned codebook of 256 float32 values (docs/algorithm.md, section 3.2).

The values are a table of bit patterns and not computed: the last bit of a computed value depends on whether the
machine uses fused multiply-adds.  The tests compare the table with bitsandbytes' ``create_dynamic_map``.

Reference: Dettmers, *8-Bit Approximations for Parallelism in Deep Learning*, arXiv 1511.04561.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from automagic_core.codec.codebook_table import SIGNED_BITS, UNSIGNED_BITS


@cache
def dynamic_codebook(signed: bool) -> np.ndarray:
    """A codebook in ascending order.

    Args:
        signed: True for values from −0.993 to 1 with zero at code 127, False for 0 to 1 with zero at code 0.

    Returns:
        float32 array of shape (256,), read-only.
    """
    bits = SIGNED_BITS if signed else UNSIGNED_BITS
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    values.setflags(write=False)
    return values


@cache
def codebook_midpoints(signed: bool) -> np.ndarray:
    """The float32 midpoints ½(c[k] + c[k+1]), where the nearest code changes.

    Returns:
        float32 array of shape (255,), read-only; entry k lies between codes k and k + 1.
    """
    values = dynamic_codebook(signed)
    middle: np.ndarray = np.float32(0.5) * (values[:-1] + values[1:])
    middle.setflags(write=False)
    return middle
