"""Decides which states an array has and in which form (docs/algorithm.md, sections 3.1, 5 and 6).

Both frameworks build their states from `StatePlan`, so they agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from automagic_core.arrays.layout import (
    Layout,
    column_axes,
    column_shape,
    picture_axes,
    row_axis,
    row_shape,
)
from automagic_core.codec.blocks import Shape, absmax_shape
from automagic_core.config.config import Config
from automagic_core.config.constants import NARROW


class Part(NamedTuple):
    """One tensor of a moment: its elements, or its row or column statistic.

    Attributes:
        shape: of the tensor.
        coded: it has 8 bits, else it is float32.
    """

    shape: Shape
    coded: bool


def long_statistic(rows: int, columns: int) -> str | None:
    """Which statistic of an array is the long one, ``"_row"`` or ``"_col"``; None where the array is not narrow."""
    if min(rows, columns) > NARROW:
        return None
    return "_row" if rows > columns else "_col"


@dataclass(frozen=True)
class StatePlan:
    """The states of one array.

    Attributes:
        shape: the array's shape.
        row_axis, column_axes: None and () for arrays without rows.
        spatial_axes: the axes on which stages 2 and 3 work; None where they leave the array alone.
        block_size: elements per block; None where the whole array is one block.
        quantized: states with one value per element have 8 bits, else 32.
        narrow: the array has rows, and fewer rows or columns than make a second long statistic worth its bytes.
        factored_sq, factored_res: `exp_avg_sq`, `exp_avg_res` are row and column means; of `exp_avg_res` a narrow array
            has those along its shorter side only.
        has_s, has_walk: the array has this state during the warm-up.
        votes: its gradients vote during the warm-up.
        has_lr_mask, has_spatial_variance, has_edge_history: the array has this state, with one value per row.
        has_background_scale: the mean of √v̂ is kept for the next step.
    """

    shape: Shape
    row_axis: int | None
    column_axes: tuple[int, ...]
    spatial_axes: tuple[int, int] | None
    row_shape: Shape
    column_shape: Shape
    block_size: int | None
    quantized: bool
    narrow: bool
    factored_sq: bool
    factored_res: bool
    has_s: bool
    has_walk: bool
    votes: bool
    has_lr_mask: bool
    has_spatial_variance: bool
    has_edge_history: bool
    has_background_scale: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Number of elements in a row."""
        return math.prod([self.shape[axis] for axis in self.column_axes])

    @property
    def row_count(self) -> int:
        """Number of rows; 1 for an array without rows."""
        return math.prod(self.row_shape)

    @property
    def absmax_shape(self) -> Shape:
        """Shape of the absmax of an 8-bit state with one value per element."""
        return absmax_shape(self.shape, self.block_size)

    def parts(self, moment: str) -> dict[str, Part]:
        """How a moment is stored: its tensors by their flat names, without the absmax (section 6.1).

        Args:
            moment: ``"exp_avg"``, ``"exp_avg_sq"``, ``"exp_avg_res"`` or ``"s"``.
        """
        if not {"exp_avg_sq": self.factored_sq, "exp_avg_res": self.factored_res}.get(moment, False):
            return {moment: Part(self.shape, self.quantized)}
        long = long_statistic(self.row_count, self.columns) if self.narrow else None
        return {
            moment + part: Part(shape, self.quantized and part == long)
            for part, shape in (("_row", self.row_shape), ("_col", self.column_shape))
            # A long statistic of `exp_avg_res` is not worth its bytes.
            if moment != "exp_avg_res" or part != long
        }


def state_plan(
    shape: Shape, config: Config, layout: Layout, *, embedding: bool = False, eight_bit: bool = True
) -> StatePlan:
    """The states that `config` gives an array.

    Args:
        shape: the array's shape.
        config: hyperparameters.
        layout: the layout of the array.
        embedding: the array is marked as an embedding.
        eight_bit: the device of the array can store 8 bits (PyTorch stores 32 on a CPU unless `force_8bit` is on).
    """
    shape = tuple(shape)
    rows = row_axis(len(shape), layout, embedding)
    has_rows = rows is not None
    warming = config.warmup_steps > 0
    spatial = picture_axes(shape, layout, config.spatial_scope)
    factored_sq = has_rows and config.factored in ("second_moment", "all")
    across = column_axes(len(shape), layout, embedding)
    columns = math.prod(shape[axis] for axis in across)
    narrow = rows is not None and long_statistic(shape[rows], columns) is not None
    return StatePlan(
        shape=shape,
        row_axis=rows,
        column_axes=across,
        spatial_axes=spatial,
        row_shape=row_shape(shape, layout, embedding),
        column_shape=column_shape(shape, layout, embedding),
        block_size=config.absmax_block_size,
        quantized=eight_bit
        and config.optim_bits == 8
        and math.prod(shape) >= config.min_8bit_size
        and not (embedding and config.stable_emb),
        narrow=narrow,
        factored_sq=factored_sq,
        factored_res=factored_sq and (narrow or config.factored == "all"),
        has_s=config.torque and config.torque_decay > 0 and warming,
        has_walk=config.searches,
        votes=config.votes,
        has_lr_mask=config.masks_rows and has_rows,
        has_spatial_variance=config.spatial_awareness and has_rows and columns > NARROW,
        has_edge_history=config.suppresses_edges and spatial is not None,
        has_background_scale=config.background_regularization and not factored_sq,
    )
