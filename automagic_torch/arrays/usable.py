"""Turns `p.grad` into stacked float32 gradients and finds arrays to skip (docs/algorithm.md, section 6.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from automagic_core.config.constants import GRADIENT_LIMIT
from automagic_torch.arrays.stacked import spread, stacked

WORTH_A_LOOK = 2**20
"""On a CPU a look at `ok` waits for no device and costs less than copying an array of at least this many bytes."""


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of parameters, which must all have one."""
    grads = [p.grad for p in params if p.grad is not None]
    assert len(grads) == len(params), "only parameters with a gradient take part"
    return grads


def raw_gradients(grads: Sequence[Tensor]) -> Tensor:
    """Stacks gradients of one shape as float32, contiguous in row-major order.

    The result may share memory with a gradient, so it must not be written into.
    """
    return stacked(grads).float()


def are_usable(g: Tensor) -> Tensor:
    """(arrays,) bool: whether every element is finite and its square stays in float32."""
    # If an element is NaN, the maximum is NaN, which compares as False.
    if not torch.compiler.is_compiling():  # without the magnitudes, which would be an array of their own
        g = g.view(len(g), -1)
        # In float16 the limit would be infinite.
        return (g.amax(1).float() <= GRADIENT_LIMIT) & (g.amin(1).float() >= -GRADIENT_LIMIT)
    # On a GPU one loop over rows forms the maximum and the means of rows.
    if g.is_cuda and g.ndim > 2:
        g = g.abs().amax(-1)
    return g.abs().view(len(g), -1).amax(1) <= GRADIENT_LIMIT


def usable_or_zero(g: Tensor, ok: Tensor) -> Tensor:
    """Replaces the gradients of skipped arrays by zeros; may return g itself."""
    # Fake tensors, a class of their own, have no values to look at.
    can_look = type(ok) is Tensor and ok.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_look and len(ok) == 1 and g.nbytes >= WORTH_A_LOOK and ok.all():
        return g
    return torch.where(spread(ok, g), g, 0.0)


def finite(x: Tensor) -> Tensor:
    """Replaces NaN by 0 and infinities by the largest numbers; may write into x."""
    if torch.compiler.is_compiling():  # a compiler makes no vector code of `isnan`
        largest = torch.finfo(x.dtype).max
        return torch.where(x == x, x, 0.0).clamp(-largest, largest)
    return x.nan_to_num_(0.0)
