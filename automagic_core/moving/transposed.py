"""Transposes the states of one array to another layout (docs/algorithm.md, section 11.2).

Float32 states, row and column statistics, sign bits and scalars stay exact.  The blocks of an 8-bit state follow the
order in memory.  Where that order changes, the state is read, transposed and rounded again.
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
    for state in SLOTS:
        if state not in states:
            continue
        if not old.quantized:
            result[state] = _transposed(states[state], axes)
            continue
        pair = states[state], states[f"{state}_absmax"]
        result[state], result[f"{state}_absmax"], error = _transposed_codes(pair, state, old, new, axes, rounding)
        if error is not None:
            rounded.append(Rounded(name, state, error))
    if "last_polarity" in states:
        result["last_polarity"] = _transposed_bits(states["last_polarity"], old, axes)
    if keeps_rows:
        # The walk keeps its values.  The signs of its next steps are others, as independent of the past as before.
        for state in (*ROW_STATES, "walk", *(f"{moment}_{part}" for moment in COMPANDED for part in ("row", "col"))):
            if state in states:
                result[state] = _transposed(states[state], axes)
    else:
        _give_new_rows(result, states, old, new, axes, name, notes)
    _match_edge_history(result, new, name, notes)
    return result, rounded


def _transposed(x: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(axes)).reshape(tuple(x.shape[axis] for axis in axes))


def _transposed_codes(
    stored: tuple[np.ndarray, np.ndarray],
    state: str,
    old: StatePlan,
    new: StatePlan,
    axes: Sequence[int],
    rounding: Rounding,
) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Codes, absmax and the relative error, which is None where every bit was kept."""
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


def _transposed_bits(packed: np.ndarray, old: StatePlan, axes: Sequence[int]) -> np.ndarray:
    last = old.shape[-1] if old.shape else 1
    bits = np.unpackbits(packed, axis=-1, count=last, bitorder="little").reshape(old.shape)
    return np.packbits(np.atleast_1d(_transposed(bits, axes)), axis=-1, bitorder="little")


def _give_new_rows(
    result: States,
    states: Mapping[str, np.ndarray],
    old: StatePlan,
    new: StatePlan,
    axes: Sequence[int],
    name: str,
    notes: Notes,
) -> None:
    """Replaces the row statistics where axes given by hand make another axis the row axis."""
    assert new.row_axis is not None
    row_source = axes[new.row_axis]
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
    for moment in COMPANDED:
        if f"{moment}_row" not in states:
            continue
        row, column = states[f"{moment}_row"], states[f"{moment}_col"]
        # The mean over all but the new rows' axis follows from the column means; single columns do not.
        others = tuple(axis for axis in range(column.ndim) if axis != row_source)
        new_row = column.mean(axis=others, keepdims=True)
        share = row / max(float(row.mean()), SQUARE_FLOOR)
        new_column = (share * column.mean(axis=row_source, keepdims=True)).astype(np.float32)
        result[f"{moment}_row"], result[f"{moment}_col"] = _transposed(new_row, axes), _transposed(new_column, axes)
        notes.lost(f"{moment} has its column means approximated: the rows are another axis now", name)


def _match_edge_history(result: States, new: StatePlan, name: str, notes: Notes) -> None:
    """Adds or drops `edge_history`: with axes given by hand, stage 2 may use only one of the two arrays."""
    if "edge_history" in result and not new.has_edge_history:
        del result["edge_history"]
        notes.lost("edge_history is dropped: stage 2 leaves the array alone now", name)
    elif "edge_history" not in result and new.has_edge_history:
        result["edge_history"] = np.zeros(new.row_shape, np.float32)
        notes.changed("edge_history begins at zero", name)
