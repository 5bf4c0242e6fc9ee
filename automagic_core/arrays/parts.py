"""Brings a moment from one form into another: elements, row and column means (docs/algorithm.md, section 10.3).

The arrays may be numpy's, PyTorch's or JAX's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from automagic_core.arrays.state_plan import StatePlan
from automagic_core.codec.blocks import Shape
from automagic_core.config.constants import SQUARE_FLOOR


def in_parts(held: Mapping[str, Any], moment: str, shapes: Mapping[str, Shape], like: Any) -> dict[str, Any]:
    """A moment in other parts.

    Args:
        held: float32, by flat name: the moment's elements, or its row and column statistics, both or one of them.
        moment: ``"exp_avg_sq"`` or ``"exp_avg_res"``.
        shapes: those of the wanted parts.
        like: any float32 array of the moment's shape and framework.

    Returns:
        float32, by flat name.  A part that was held stays as it is.
    """
    if shapes.keys() <= held.keys():
        return {name: held[name] for name in shapes}
    whole = elements(held, moment) * like**0  # ones, whatever `like` holds; a boolean would need a conversion in JAX
    return {name: held[name] if name in held else mean_to(whole, shape) for name, shape in shapes.items()}


def part_shapes(plan: StatePlan, moment: str) -> dict[str, Shape]:
    """The shapes of the parts that a plan gives a moment."""
    return {name: part.shape for name, part in plan.parts(moment).items()}


def elements(held: Mapping[str, Any], moment: str) -> Any:
    """The elements of a moment, or what its statistics say about them: R / mean R · C, or one of the two."""
    if moment in held:
        return held[moment]
    row, column = held.get(moment + "_row"), held.get(moment + "_col")
    if row is None or column is None:
        return column if row is None else row
    return row / max(float(row.mean()), SQUARE_FLOOR) * column


def mean_to(x: Any, shape: tuple[int, ...]) -> Any:
    """The mean over the axes that have length 1 in `shape`, which keep that length; `x` has the same number of axes."""
    axes = tuple(axis for axis, n in enumerate(shape) if n == 1 and x.shape[axis] != 1)
    return x.mean(axis=axes, keepdims=True) if axes else x


def what_is_lost(moment: str, was: Collection[str], wanted: Collection[str]) -> str | None:
    """A sentence on a moment that goes from some parts to others; None where nothing is lost."""
    if set(wanted) <= set(was):
        return None if len(wanted) == len(was) else f"{moment} goes on as means along the shorter axis"
    if moment in was:
        return f"{moment} goes on as row and column means: single values are gone"
    return f"{moment} is approximated by the product of its row and column means"
