"""The table of section 1: rows, columns and spatial axes; and the shapes of packed bits and block scales."""

from __future__ import annotations

import math

import numpy as np
import pytest

from automagic_core import (
    absmax_shape,
    check_layout,
    column_axes,
    column_shape,
    row_axis,
    row_shape,
    spatial_axes,
)

# layout, embedding, shape, row axis, columns, row shape, column shape
ROWS = [
    ("torch", False, (7, 3), 0, (1,), (7, 1), (1, 3)),
    ("flax", False, (3, 7), 1, (0,), (1, 7), (3, 1)),
    ("torch", True, (50, 6), 0, (1,), (50, 1), (1, 6)),
    ("flax", True, (50, 6), 0, (1,), (50, 1), (1, 6)),
    ("torch", False, (7, 3, 5), 0, (1, 2), (7, 1, 1), (1, 3, 5)),
    ("flax", False, (5, 3, 7), 2, (0, 1), (1, 1, 7), (5, 3, 1)),
    ("torch", False, (7, 3, 5, 4), 0, (1, 2, 3), (7, 1, 1, 1), (1, 3, 5, 4)),
    ("flax", False, (5, 4, 3, 7), 3, (0, 1, 2), (1, 1, 1, 7), (5, 4, 3, 1)),
    ("torch", False, (7, 3, 2, 5, 4), 0, (1, 2, 3, 4), (7, 1, 1, 1, 1), (1, 3, 2, 5, 4)),
    ("flax", False, (2, 5, 4, 3, 7), 4, (0, 1, 2, 3), (1, 1, 1, 1, 7), (2, 5, 4, 3, 1)),
]


@pytest.mark.parametrize(("layout", "embedding", "shape", "row", "columns", "rows", "reduced"), ROWS)
def test_rows_and_columns(layout, embedding, shape, row, columns, rows, reduced) -> None:
    assert row_axis(len(shape), layout, embedding) == row
    assert column_axes(len(shape), layout, embedding) == columns
    assert row_shape(shape, layout, embedding) == rows
    assert column_shape(shape, layout, embedding) == reduced
    # What the names mean: means over those axes have those shapes, and a row statistic has one value per row.
    array = np.zeros(shape)
    assert array.mean(axis=columns, keepdims=True).shape == rows
    assert array.mean(axis=row, keepdims=True).shape == reduced
    assert math.prod(rows) == shape[row]


@pytest.mark.parametrize("layout", ["torch", "flax"])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("ndim", [0, 1])
def test_fewer_than_two_axes_have_no_rows(layout, embedding: bool, ndim: int) -> None:
    assert row_axis(ndim, layout, embedding) is None
    assert column_axes(ndim, layout, embedding) == ()
    assert spatial_axes(ndim, layout) is None


@pytest.mark.parametrize(
    ("layout", "ndim", "axes"),
    [
        ("torch", 2, (0, 1)),
        ("flax", 2, (0, 1)),
        ("torch", 3, None),  # one spatial axis only
        ("flax", 3, None),
        ("torch", 4, (2, 3)),  # -2, -1
        ("flax", 4, (0, 1)),  # -4, -3
        ("torch", 5, (3, 4)),
        ("flax", 5, (1, 2)),
        ("torch", 6, (4, 5)),
        ("flax", 6, (2, 3)),
    ],
)
def test_spatial_axes(layout, ndim: int, axes: tuple[int, int] | None) -> None:
    assert spatial_axes(ndim, layout) == axes


@pytest.mark.parametrize("spatial", [(3, 4), (2, 3, 4)])
def test_both_layouts_name_the_same_things(spatial: tuple[int, ...]) -> None:
    torch_shape, flax_shape = (7, 5, *spatial), (*spatial, 5, 7)
    ndim = len(torch_shape)
    assert torch_shape[row_axis(ndim, "torch")] == flax_shape[row_axis(ndim, "flax")] == 7
    torch_lengths = [torch_shape[axis] for axis in spatial_axes(ndim, "torch")]
    assert torch_lengths == [flax_shape[axis] for axis in spatial_axes(ndim, "flax")] == list(spatial[-2:])


@pytest.mark.parametrize("bad", ["keras", "", None, "Torch"])
def test_unknown_layout(bad) -> None:
    with pytest.raises(ValueError, match="'torch', 'flax'"):
        check_layout(bad)
    check_layout("torch")
    check_layout("flax")


@pytest.mark.parametrize(
    ("shape", "block", "scales"),
    [
        ((), 256, (1,)),
        ((1,), 256, (1,)),
        ((255,), 256, (1,)),
        ((256,), 256, (1,)),
        ((257,), 256, (2,)),
        ((4, 256), 256, (4, 1)),  # the blocks lie inside the last axis
        ((3, 4, 512), 256, (3, 4, 2)),
        ((512, 4), 256, (8,)),  # they do not
        ((3, 500), 256, (6,)),
        ((3, 512), 64, (3, 8)),
        ((3, 512), 1024, (2,)),
        ((3, 512), None, (1,)),
        ((), None, (1,)),
        ((0,), 256, (0,)),
        ((0, 256), 256, (0, 1)),
        ((4, 0), 256, (4, 0)),
        ((0,), None, (1,)),
        ((1000, 1003), 256, (3918,)),
    ],
)
def test_absmax_shape(shape: tuple[int, ...], block: int | None, scales: tuple[int, ...]) -> None:
    assert absmax_shape(shape, block) == scales
