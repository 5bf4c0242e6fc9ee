"""Rows, columns and spatial axes of an array in each layout (docs/algorithm.md, sections 1.1 to 1.3)."""

from __future__ import annotations

from typing import Literal, get_args

from automagic_core.codec.blocks import Shape

Layout = Literal["torch", "flax"]
"""What the axes of an array mean (docs/algorithm.md, section 1.1)."""


def check_layout(layout: str) -> None:
    """Raises a ValueError unless `layout` is a known one."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout = {layout!r} is not one of {', '.join(map(repr, get_args(Layout)))}")


def row_axis(ndim: int, layout: Layout, embedding: bool = False) -> int | None:
    """The row axis as a non-negative number; None for arrays with fewer than two axes.

    Args:
        ndim: number of axes of the array.
        layout: ``"torch"`` (out, in, *spatial) or ``"flax"`` (*spatial, in, out).
        embedding: the array is marked as an embedding, (num, features) in both layouts.
    """
    if ndim < 2:
        return None
    return 0 if layout == "torch" or embedding else ndim - 1


def column_axes(ndim: int, layout: Layout, embedding: bool = False) -> tuple[int, ...]:
    """All axes except the row axis; empty for arrays with fewer than two axes."""
    row = row_axis(ndim, layout, embedding)
    return () if row is None else tuple(axis for axis in range(ndim) if axis != row)


def spatial_axes(ndim: int, layout: Layout) -> tuple[int, int] | None:
    """The two axes that can be treated as a picture: both of a 2-D array, two of a convolution kernel; else None."""
    if ndim == 2:
        return (0, 1)
    if ndim < 4:
        return None
    return (ndim - 2, ndim - 1) if layout == "torch" else (ndim - 4, ndim - 3)


def picture_axes(shape: Shape, layout: Layout, scope: str = "all") -> tuple[int, int] | None:
    """The spatial axes on which stages 2 and 3 work; None for arrays that they leave alone (section 1.3).

    Args:
        shape, layout: of the array.
        scope: `spatial_scope`: ``"conv"`` leaves arrays with two axes alone.
    """
    axes = None if scope == "conv" and len(shape) == 2 else spatial_axes(len(shape), layout)
    if axes is None or min(shape[axis] for axis in axes) < 3 or 0 in shape:
        return None
    return axes


def row_shape(shape: Shape, layout: Layout, embedding: bool = False) -> Shape:
    """Shape of a row statistic, which has one value per row and broadcasts against the array: (1, 1, 1, out)."""
    row = row_axis(len(shape), layout, embedding)
    return tuple(n if axis == row else 1 for axis, n in enumerate(shape))


def column_shape(shape: Shape, layout: Layout, embedding: bool = False) -> Shape:
    """Shape of a column statistic: the array reduced over its row axis."""
    row = row_axis(len(shape), layout, embedding)
    return tuple(1 if axis == row else n for axis, n in enumerate(shape))
