"""Finds codes by tables, in operations that a compiler makes one loop of (docs/algorithm.md, sections 3.5 and 3.6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from automagic_core import dynamic_codebook
from automagic_core.codec.half_steps import COUNT_SHIFT, half_steps


class Tables(NamedTuple):
    """`automagic_core.codec.half_steps` of one codebook, and the codebook, on a device."""

    codebook: Tensor
    bins: Tensor
    nearest: Tensor
    gap: Tensor
    dropped_bits: int
    first_bin: int
    last_bin: int


_known: dict[tuple[bool, str], Tables] = {}


def prepare_tables(device: torch.device) -> None:
    """Copies the tables to a device, which cannot be done while a function is traced."""
    for signed in (True, False):
        if (signed, str(device)) not in _known:
            steps = half_steps(signed)
            arrays = (dynamic_codebook(signed), steps.bins, steps.nearest, steps.gap)
            codebook, bins, nearest, gap = (torch.from_numpy(array.copy()).to(device) for array in arrays)
            numbers = (steps.dropped_bits, steps.first_bin, len(steps.bins) - 1)
            _known[signed, str(device)] = Tables(codebook, bins, nearest, gap, *numbers)


def tables(signed: bool, device: torch.device) -> Tables:
    """The tables on a device; `prepare_tables` comes first."""
    return _known[signed, str(device)]


def codes_of(y: Tensor, signed: bool, r: Tensor | None) -> Tensor:
    """The code of the codebook value nearest to y, or by chance that of the value on the other side of y.

    Args:
        y: float32 in [−1, 1], of any shape.
        signed: which codebook.
        r: numbers in [0, 1) that broadcast to y, for stochastic rounding; None rounds to nearest.

    Returns:
        int32 in the shape of y.
    """
    table = tables(signed, y.device)
    dropped, one = table.dropped_bits, 1 << COUNT_SHIFT
    magnitude = y.abs()
    bits = magnitude.view(torch.int32)
    word = table.bins[((bits >> dropped) - table.first_bin).clamp(0, table.last_bin)]
    place = bits & ((1 << dropped) - 1)
    # Its high bits say how many thresholds are ≤ |y|.  Even: |y| is at or above its nearest value; odd: below.  The low
    # bits stay: of bare counts a compiler makes sums of 16-bit pairs, some of which CUDA 12.8 gets wrong.
    counted = word + ((place >= (word & (one - 1))).int() << COUNT_SHIFT)
    up: Tensor | int = one
    if r is not None:
        passed = counted >> COUNT_SHIFT
        # Beyond the last value the gap is infinite, so there is no step to a neighbour.
        chance = (magnitude - table.nearest[passed]).abs() / table.gap[passed]
        up = torch.where(r < chance, (~counted & one) << 1, one)
    distance = (counted + up) >> (COUNT_SHIFT + 1)
    # The negative side ends at −0.993, 127 codes below zero.
    return torch.where(y < 0, 127 - distance.clamp(max=127), 127 + distance) if signed else distance
