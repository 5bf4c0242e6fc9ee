"""Reads and writes the stored tensors of a moment in numpy, by their flat names (docs/algorithm.md, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from automagic_core.arrays.state_forms import COMPANDED, moment_of
from automagic_core.codec.numpy_codec import decode, encode


def as_stored(states: Mapping[str, np.ndarray], name: str, block_size: int | None) -> np.ndarray:
    """A tensor as float32.  Codes of a companded moment give the root."""
    if f"{name}_absmax" not in states:
        return states[name]
    return decode(states[name], states[f"{name}_absmax"], moment_of(name) not in COMPANDED, block_size)


def value(states: Mapping[str, np.ndarray], name: str, block_size: int | None) -> np.ndarray:
    """The values of a tensor, float32."""
    stored = as_stored(states, name, block_size)
    return np.square(stored) if f"{name}_absmax" in states and moment_of(name) in COMPANDED else stored


def codes(
    stored: np.ndarray, name: str, block_size: int | None, random: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Codes and absmax by their flat names.

    Args:
        stored: as `as_stored` gives it: of a companded moment the root.
        name: the tensor's.
        block_size, random: as for `encode`.
    """
    coded, absmax = encode(stored, moment_of(name) not in COMPANDED, block_size, random)
    return {name: coded, f"{name}_absmax": absmax}
