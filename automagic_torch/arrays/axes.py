"""Axes counted from the end, so that they also hold for batches (docs/algorithm.md, section 1.1)."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from automagic_core import Layout, check_layout, column_axes, picture_axes, row_axis


@lru_cache(maxsize=4096)
def spatial_from_end(shape: tuple[int, ...], layout: Layout) -> tuple[int, int] | None:
    """The spatial axes on which stages 2 and 3 work; None for an array that they leave alone."""
    check_layout(layout)
    axes = picture_axes(shape, layout)
    return None if axes is None else (axes[0] - len(shape), axes[1] - len(shape))


@lru_cache(maxsize=4096)
def columns_from_end(ndim: int, layout: Layout, embedding: bool) -> tuple[int, ...]:
    """All axes except the row axis."""
    return tuple(axis - ndim for axis in column_axes(ndim, layout, embedding))


def rows_come_last(layout: Layout, embedding: bool) -> bool:
    """Whether the row axis of a 2-D array is its second."""
    return row_axis(2, layout, embedding) == 1


def array_shape(x: Tensor, batched: bool) -> tuple[int, ...]:
    """The shape of one array of a batch, or of the array itself."""
    return tuple(x.shape[1:] if batched else x.shape)
