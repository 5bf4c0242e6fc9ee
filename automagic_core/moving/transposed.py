"""Transposes the states of one array to another layout (docs/algorithm.md, section 11.2).

Float32 states and scalars stay exact.  The blocks of an 8-bit state follow the order in memory.  Where that order
changes, a state of more than one block is read, transposed and rounded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from automagic_core.arrays.axes import keeps_memory_order
from automagic_core.arrays.coded import as_stored, codes, value
from automagic_core.arrays.parts import elements, in_parts, part_shapes
from automagic_core.arrays.state_forms import ROW_STATES, SLOTS, moment_of
from automagic_core.arrays.state_plan import StatePlan
from automagic_core.codec.blocks import absmax_shape
from automagic_core.codec.random_bits import random_unit
from automagic_core.moving.notes import Notes

States = dict[str, np.ndarray]
Parts = dict[str, tuple[States, float | None]]
"""By part: its tensors by flat name, and the relative error where it was rounded again."""


class Rounded(NamedTuple):
    """An 8-bit state that was rounded again.

    Attributes:
        array: the parameter's name.
        state: its flat name, such as ``"exp_avg"`` or ``"exp_avg_sq_col"``.
        error: ‖new − old‖ / ‖old‖ of what is stored, the square root for `exp_avg_sq` and `exp_avg_res`.
    """

    array: str
    state: str
    error: float


class Rounding(NamedTuple):
    """How 8-bit states are rounded: with the random bits of `step` (section 3.7), or to nearest."""

    step: int
    stochastic: bool


def transposed_states(
    states: Mapping[str, np.ndarray],
    old: StatePlan,
    new: StatePlan,
    axes: Sequence[int],
    rounding: Rounding,
    name: str,
    notes: Notes,
) -> tuple[States, list[Rounded]]:
    """Transposes all states of an array.

    Args:
        states: by name, in the forms that `old` plans.
        old, new: the array's plans before and after, with the same bits.
        axes: axis k of the new array is axis ``axes[k]`` of the old one.
        rounding: how 8-bit states are rounded.
        name: the parameter's name, for the notes.
        notes: collects what is lost where another axis becomes the row axis.

    Returns:
        The states for `new`, and the 8-bit states that were rounded again.
    """
    keeps_rows = old.row_axis is None or new.row_axis is None or axes[new.row_axis] == old.row_axis
    result, rounded = dict(states), []
    for moment in SLOTS:
        if not old.parts(moment).keys() <= states.keys():
            continue
        if old.parts(moment).keys() == new.parts(moment).keys() and (keeps_rows or moment in states):
            transposed = _transposed_parts(states, moment, old, axes, rounding)
        else:
            transposed = _parts_of_new_rows(states, moment, old, new, axes, rounding)
            notes.lost(f"{moment} has its means approximated: the rows are another axis now", name)
        result = {state: x for state, x in result.items() if moment_of(state) != moment}
        for state, (tensors, error) in transposed.items():
            result |= tensors
            if error is not None:
                rounded.append(Rounded(name, state, error))
    if keeps_rows:
        # The walk keeps its values.  The signs of its next steps are others, as independent of the past as before.
        for state in (*ROW_STATES, "walk"):
            if state in states:
                result[state] = _transposed(states[state], axes)
    else:
        _give_new_rows(result, states, new, name, notes)
    _match_row_states(result, new, name, notes)
    return result, rounded


def _transposed(x: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(axes)).reshape(tuple(x.shape[axis] for axis in axes))


def _transposed_parts(
    states: Mapping[str, np.ndarray], moment: str, plan: StatePlan, axes: Sequence[int], rounding: Rounding
) -> Parts:
    """The parts of a moment whose rows stay rows; every bit stays where the blocks do."""
    result: Parts = {}
    for state, part in plan.parts(moment).items():
        if not part.coded:
            result[state] = {state: _transposed(states[state], axes)}, None
        elif states[f"{state}_absmax"].size == 1 or keeps_memory_order(part.shape, axes):
            moved = _transposed(states[state], axes)
            absmax = states[f"{state}_absmax"].reshape(absmax_shape(moved.shape, plan.block_size))
            result[state] = {state: moved, f"{state}_absmax": absmax}, None
        else:
            stored = _transposed(as_stored(states, state, plan.block_size), axes)
            result[state] = _rounded(stored, state, plan.block_size, rounding)
    return result


def _parts_of_new_rows(
    states: Mapping[str, np.ndarray],
    moment: str,
    old: StatePlan,
    new: StatePlan,
    axes: Sequence[int],
    rounding: Rounding,
) -> Parts:
    """The parts of a factored moment where axes given by hand make another axis the row axis."""
    held = {state: value(states, state, old.block_size) for state in old.parts(moment)}
    whole = _transposed(elements(held, moment) * np.ones(old.shape, np.float32), axes)
    result: Parts = {}
    for state, mean in in_parts({moment: whole}, moment, part_shapes(new, moment), whole).items():
        coded = new.parts(moment)[state].coded
        result[state] = _rounded(np.sqrt(mean), state, new.block_size, rounding) if coded else ({state: mean}, None)
    return result


def _rounded(stored: np.ndarray, state: str, block_size: int | None, rounding: Rounding) -> tuple[States, float]:
    """Codes and absmax, and the relative error."""
    random = random_unit(rounding.step, SLOTS[moment_of(state)], stored.size) if rounding.stochastic else None
    result = codes(stored, state, block_size, random)
    size = float(np.linalg.norm(stored.astype(np.float64)))
    distance = float(np.linalg.norm((as_stored(result, state, block_size) - stored).astype(np.float64)))
    return result, distance / size if size > 0 else 0.0


def _give_new_rows(result: States, states: Mapping[str, np.ndarray], new: StatePlan, name: str, notes: Notes) -> None:
    """Replaces the row statistics where axes given by hand make another axis the row axis."""
    for state in ROW_STATES:
        if state in states:
            mean = states[state].mean(dtype=np.float64)
            result[state] = np.full(new.row_shape, mean, np.float32)
            notes.lost(f"{state} goes on at its mean: the rows are another axis now", name)
    if "walk" in states:
        # Its square is what counts, over all rows.
        square = np.square(states["walk"], dtype=np.float64).sum()
        result["walk"] = np.full(new.row_shape, np.sqrt(square / new.row_count), np.float32)
        notes.lost("walk keeps only its length: the rows are another axis now", name)


def _match_row_states(result: States, new: StatePlan, name: str, notes: Notes) -> None:
    """Adds or drops states that only one of the two arrays has, with axes given by hand."""
    for state in ("edge_history", "spatial_variance"):
        has = getattr(new, f"has_{state}")
        if state in result and not has:
            del result[state]
            notes.lost(f"{state} is dropped: the array has no use for it now", name)
        elif state not in result and has:
            result[state] = np.zeros(new.row_shape, np.float32)
            notes.changed(f"{state} begins at zero", name)
