"""The dynamic 8-bit codebook: 256 float32 values, signed or unsigned (section 3).

The values are shipped as a table of float32 bit patterns instead of being recomputed, because the last bit of
a recomputed value depends on whether the machine's `linspace` used fused multiply-add.  The tests hold the
table against bitsandbytes' ``create_dynamic_map``.

Reference: Dettmers, *8-Bit Approximations for Parallelism in Deep Learning*, arXiv 1511.04561.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from automagic_core.codec.codebook_table import SIGNED_BITS, UNSIGNED_BITS


@cache
def dynamic_codebook(signed: bool) -> np.ndarray:
    """The codebook, ascending.

    Args:
        signed: the map from −0.993 to 1 with zero at code 127, or the one from 0 to 1 with zero at code 0.

    Returns:
        float32 array of shape (256,), read-only.
    """
    bits = SIGNED_BITS if signed else UNSIGNED_BITS
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    values.setflags(write=False)
    return values


@cache
def codebook_midpoints(signed: bool) -> np.ndarray:
    """The float32 midpoints ½(c[k] + c[k+1]) at which rounding to nearest changes its mind.

    Returns:
        float32 array of shape (255,), read-only; entry k lies between codes k and k + 1.
    """
    values = dynamic_codebook(signed)
    middle = np.float32(0.5) * (values[:-1] + values[1:])
    middle.setflags(write=False)
    return middle
