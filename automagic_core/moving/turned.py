"""One array's states after a permutation of its axes.

Float32 states, row and column statistics, sign bits and scalars move exactly.  An 8-bit state is cut into blocks in
memory order, so where that order changes it is read, transposed and rounded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from automagic_core.arrays.axes import keeps_memory_order
from automagic_core.arrays.state_forms import COMPANDED, ROW_STATES, SLOTS
from automagic_core.arrays.state_plan import StatePlan
from automagic_core.codec.numpy_codec import decode, encode
from automagic_core.codec.random_bits import random_unit
from automagic_core.config.constants import SQUARE_FLOOR
from automagic_core.moving.notes import Notes

States = dict[str, np.ndarray]


class Rounded(NamedTuple):
    """An 8-bit state that was rounded again.

    Attributes:
        array: the parameter's name.
        state: ``"exp_avg"``, ``"exp_avg_sq"``, ``"exp_avg_res"`` or ``"s"``.
        error: ‖new − old‖ / ‖old‖ of what is stored, the square root for `exp_avg_sq` and `exp_avg_res`.
    """

    array: str
    state: str
    error: float


class Rounding(NamedTuple):
    """How states are rounded again: with the random bits of `step` (section 3), or to nearest."""

    step: int
    stochastic: bool


def turned(
    states: Mapping[str, np.ndarray],
    old: StatePlan,
    new: StatePlan,
    axes: Sequence[int],
    rounding: Rounding,
    name: str,
    notes: Notes,
) -> tuple[States, list[Rounded]]:
    """The states of an array that was transposed.

    Args:
        states: by flat name, as `check_states` accepts them for `old`.
        old, new: the array's plans before and after, with the same bits.
        axes: axis k of the new array is axis ``axes[k]`` of the old one.
        rounding: of 8-bit states.
        name: the parameter's, for notes and errors.
        notes: gets what is lost where the rows become other axes.

    Returns:
        The states for `new`, and what was rounded again.
    """
    keeps_rows = old.row_axis is None or new.row_axis is None or axes[new.row_axis] == old.row_axis
    moved, rounded = dict(states), []
    for state in SLOTS:
        if state not in states:
            continue
        if not old.quantized:
            moved[state] = _transposed(states[state], axes)
            continue
        pair = states[state], states[f"{state}_absmax"]
        moved[state], moved[f"{state}_absmax"], error = _turned_codes(pair, state, old, new, axes, rounding)
        if error is not None:
            rounded.append(Rounded(name, state, error))
    if "last_polarity" in states:
        moved["last_polarity"] = _turned_bits(states["last_polarity"], old, axes)
    if keeps_rows:
        for state in (*ROW_STATES, *(f"{moment}_{part}" for moment in COMPANDED for part in ("row", "col"))):
            if state in states:
                moved[state] = _transposed(states[state], axes)
    else:
        _give_new_rows(moved, states, old, new, axes, name, notes)
    _match_edge_history(moved, new, name, notes)
    return moved, rounded


def _transposed(x: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(axes)).reshape(tuple(x.shape[axis] for axis in axes))


def _turned_codes(
    stored: tuple[np.ndarray, np.ndarray],
    state: str,
    old: StatePlan,
    new: StatePlan,
    axes: Sequence[int],
    rounding: Rounding,
) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Codes, scales and the relative error; None where every bit was kept."""
    codes, absmax = stored
    if keeps_memory_order(old.shape, axes):
        return codes.reshape(new.shape), absmax.reshape(new.absmax_shape), None
    signed = state not in COMPANDED
    value = _transposed(decode(codes, absmax, signed, old.block_size), axes)
    random = random_unit(rounding.step, SLOTS[state], value.size) if rounding.stochastic else None
    codes, absmax = encode(value, signed, new.block_size, random)
    size = float(np.linalg.norm(value.astype(np.float64)))
    distance = float(np.linalg.norm((decode(codes, absmax, signed, new.block_size) - value).astype(np.float64)))
    return codes, absmax, distance / size if size > 0 else 0.0


def _turned_bits(packed: np.ndarray, old: StatePlan, axes: Sequence[int]) -> np.ndarray:
    last = old.shape[-1] if old.shape else 1
    bits = np.unpackbits(packed, axis=-1, count=last, bitorder="little").reshape(old.shape)
    return np.packbits(np.atleast_1d(_transposed(bits, axes)), axis=-1, bitorder="little")


def _give_new_rows(
    moved: States,
    states: Mapping[str, np.ndarray],
    old: StatePlan,
    new: StatePlan,
    axes: Sequence[int],
    name: str,
    notes: Notes,
) -> None:
    """Row statistics where another axis counts the rows now, as only axes given by hand make it."""
    assert new.row_axis is not None
    row_source = axes[new.row_axis]
    for state in ROW_STATES:
        if state in states:
            mean = states[state].mean(dtype=np.float64)
            moved[state] = np.full(new.row_shape, mean, np.float32)
            notes.lost(f"{state} goes on at its mean: the rows are another axis now", name)
    for moment in COMPANDED:
        if f"{moment}_row" not in states:
            continue
        row, column = states[f"{moment}_row"], states[f"{moment}_col"]
        # The mean over all but the new rows' axis follows from the column means; single columns do not.
        others = tuple(axis for axis in range(column.ndim) if axis != row_source)
        new_row = column.mean(axis=others, keepdims=True)
        share = row / max(float(row.mean()), SQUARE_FLOOR)
        new_column = (share * column.mean(axis=row_source, keepdims=True)).astype(np.float32)
        moved[f"{moment}_row"], moved[f"{moment}_col"] = _transposed(new_row, axes), _transposed(new_column, axes)
        notes.lost(f"{moment} has its column means approximated: the rows are another axis now", name)


def _match_edge_history(moved: States, new: StatePlan, name: str, notes: Notes) -> None:
    """Stage 2 may see a picture in one order of the axes and none in the other, again with axes given by hand only."""
    if "edge_history" in moved and not new.has_edge_history:
        del moved["edge_history"]
        notes.lost("edge_history is dropped: stage 2 leaves the array alone now", name)
    elif "edge_history" not in moved and new.has_edge_history:
        moved["edge_history"] = np.zeros(new.row_shape, np.float32)
        notes.changed("edge_history begins at zero", name)
