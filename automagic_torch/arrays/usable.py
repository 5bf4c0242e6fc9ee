"""From `p.grad` to stacked float32 gradients that are safe to compute with (section 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from automagic_core.config.constants import GRADIENT_LIMIT
from automagic_torch.arrays.stacked import spread, stacked


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of parameters that all have one."""
    grads = [p.grad for p in params if p.grad is not None]
    assert len(grads) == len(params), "only parameters with a gradient take part"
    return grads


def raw_gradients(grads: Sequence[Tensor]) -> Tensor:
    """Gradients of one shape: float32, stacked, contiguous in the logical row-major order.

    It may be a gradient's own memory, so it is not to be written to.
    """
    return stacked(grads).float()


def are_usable(g: Tensor) -> Tensor:
    """(arrays,) bool: every element is finite and its square stays in float32."""
    # The largest of elements of which one is NaN is NaN, which compares as False.
    return g.abs().view(len(g), -1).amax(1) <= GRADIENT_LIMIT


def usable_or_zero(g: Tensor, ok: Tensor) -> Tensor:
    """The gradients of skipped arrays as zeros, so that no NaN travels further."""
    # Numbers first, since NaN · 0 is NaN.
    return torch.nan_to_num(g, 0.0, 0.0, 0.0).mul_(spread(ok, g).float())
