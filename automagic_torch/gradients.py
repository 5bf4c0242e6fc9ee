"""From `p.grad` to the gradient that section 5 sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from automagic_core.constants import GRADIENT_LIMIT


class HasGradient(Protocol):
    """An array that takes part in a call."""

    param: Tensor
    ok: Tensor

    @property
    def call(self) -> HasFactor:
        """Its group's call."""


class HasFactor(Protocol):
    """What stage 1 decides for a group."""

    def clipping_factor(self, device: torch.device) -> Tensor | None:
        """0-d, or None where the stage is off."""


def raw_gradient(p: Tensor) -> Tensor:
    """`p.grad` in float32, contiguous in the logical row-major order of p."""
    assert p.grad is not None
    return p.grad.detach().float().contiguous()


def is_usable(p: Tensor) -> Tensor:
    """0-d bool on p's device: every element is finite and its square stays in float32 (section 6)."""
    # A NaN compares as False.
    return (raw_gradient(p).abs() <= GRADIENT_LIMIT).all()


def gradient_stages(arrays: Sequence[HasGradient]) -> Iterator[Tensor]:
    """The gradients of all arrays of a call, in order and one at a time, so that one float32 copy lives at once.

    The gradient of a skipped array comes as zeros, so that no NaN travels further.  Stage 1 is done.
    """
    for array in arrays:
        g = torch.where(array.ok, raw_gradient(array.param), 0.0)
        factor = array.call.clipping_factor(g.device)
        yield g if factor is None else g * factor
