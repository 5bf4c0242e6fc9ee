"""Stage 2: smooths a gradient where it is rougher than its row usually is (docs/algorithm.md, section 4.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from automagic_core import Layout, decay
from automagic_core.config.constants import EDGE_DECAY
from automagic_torch.arrays.averages import ema, one_minus_power
from automagic_torch.arrays.axes import array_shape, columns_from_end, spatial_from_end

SLAB = 2**18
"""A slab has about this many elements on a CPU."""


def suppress_edges(
    g: Tensor,
    edge_history: Tensor | None,
    age: Tensor,
    *,
    penalty: float,
    threshold: float,
    layout: Layout = "torch",
    embedding: bool = False,
    batched: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Smooths g by as much as it is rougher than its row's history.

    Args:
        g: gradient of one array, finite float32, or with `batched` of arrays stacked along a leading axis.
        edge_history: float32 in `automagic_core.row_shape`, with the batch axis in front if there is one; zeros before
            the first step.  None for an array that the stage leaves alone.
        age: int32, the steps that the array took, this one included: 0-d, or one per array of the batch.
        penalty: λ in [0, 0.2].
        threshold: θ ≥ 0.
        layout, embedding: decide which axes are rows, columns and spatial axes (sections 1.1 to 1.3).
        batched: the first axis of g counts arrays.

    Returns:
        The new gradient and the new history; both unchanged for an array that the stage leaves alone.
    """
    shape = array_shape(g, batched)
    axes = spatial_from_end(shape, layout)
    if axes is None or edge_history is None:
        return g, edge_history
    first, across = -len(shape), columns_from_end(len(shape), layout, embedding)
    beta, age = decay(EDGE_DECAY), age.float()
    correction = one_minus_power(beta, age).reshape(-1, *[1] * len(shape)) if batched else one_minus_power(beta, age)
    n = shape[0]
    # A large array goes in slabs of rows, which stay in the cache of a CPU.
    rows = n if first in across or g.device.type != "cpu" else max(1, SLAB * n // math.prod(shape))
    out, histories = torch.empty_like(g), []
    for at, history in zip(range(0, n, rows), torch.split(edge_history, rows, first), strict=True):
        count, above = min(rows, n - at), min(at, 1)
        near = g.narrow(first, at - above, min(above + count + 1, above + n - at))
        rough = laplacian(near, axes).narrow(first, above, count)
        size = rough.abs()
        histories.append(ema(beta, history, size.mean(dim=across, keepdim=True)))
        excess = (size - histories[-1] * ((1 + threshold) / correction)).clamp(min=0)
        out.narrow(first, at, count).copy_(torch.add(g.narrow(first, at, count), rough.sign() * excess, alpha=penalty))
    return out, torch.cat(histories, first)


def laplacian(x: Tensor, axes: tuple[int, int]) -> Tensor:
    """The 5-point Laplacian over two axes, with a copy of the border beyond the border."""
    result = torch.zeros_like(x)
    for axis in axes:
        # Differences, not a weighted sum, so that a constant array gives exact zeros.
        difference = x.diff(dim=axis)
        inner = x.shape[axis] - 1
        result.narrow(axis, 0, inner).add_(difference)
        result.narrow(axis, 1, inner).sub_(difference)
    return result
