"""The neutral form: a run's optimizer state as numpy arrays, in no framework (docs/algorithm.md, section 11.1).

Each framework converts its own state to this form and back.  The state file (section 11.3) holds it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from automagic_core.arrays.axes import axes_between, check_axes, transposed_shape
from automagic_core.arrays.layout import Layout, check_layout
from automagic_core.arrays.state_forms import SEARCH_SCALARS, Form, as_held, check_forms, state_forms
from automagic_core.arrays.state_plan import state_plan
from automagic_core.codec.blocks import Shape
from automagic_core.config.config import FIELD_NAMES, Config, check_names
from automagic_core.config.constants import MAX_STEP, NORM_HISTORY
from automagic_core.moving.notes import Notes
from automagic_core.moving.transposed import Rounded, Rounding, transposed_states

Axes = Mapping[str, Sequence[int]]
"""Permutations given by hand, by parameter name."""


@dataclasses.dataclass(frozen=True)
class NeutralArray:
    """The states of one parameter.

    Attributes:
        name: its name, or its position as a string where the run knows no names.
        shape: the parameter's; None where it took no step and its shape is not known.
        embedding, lora: its marks (section 1.4).
        states: by flat name (`automagic_core.arrays.state_forms`); none before its first step in PyTorch.
    """

    name: str
    shape: Shape | None
    embedding: bool
    lora: bool
    states: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class NeutralGroup:
    """One set of hyperparameters and its parameters: a group in PyTorch, a transformation in JAX.

    Attributes:
        fields: every field of `Config`; `lr` has the value that a scheduler set last.
        layout: the layout of all arrays.
        step: t, the number of calls.
        shared: those of `SEARCH_SCALARS`, float32 (), and with
            `percentile_clipping` `norm_history`, float32 (100,), and `norm_position`, int32 ().
        arrays: in PyTorch's order if the run came from PyTorch.
        named: whether the arrays have names of their own.
        others: other entries of a PyTorch group, numbers and strings such as `initial_lr`.
    """

    fields: Mapping[str, Any]
    layout: Layout
    step: int
    shared: Mapping[str, np.ndarray]
    arrays: tuple[NeutralArray, ...]
    named: bool
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The hyperparameters; `min_lr` stands in for `lr`, which a scheduler may set to any value."""
        return config_of(self.fields)

    @property
    def warming(self) -> bool:
        """Fewer than `warmup_steps` steps are over."""
        return bool(self.step < self.fields["warmup_steps"])


def one_group(groups: Sequence[NeutralGroup], index: int | None, label: str) -> NeutralGroup:
    """The group with which one transformation goes on.

    Args:
        groups: all groups of the run.
        index: which of them; None where there is only one.
        label: how errors call the run.

    Raises:
        ValueError: several groups and no index, or no such group.
    """
    if index is None and len(groups) != 1:
        raise ValueError(
            f"{label} has {len(groups)} parameter groups; a transformation has one set of hyperparameters and one "
            f"log_rate_scale, so carry each by itself: group=0 to {len(groups) - 1}, each with its own part of the "
            "parameters (optax.partition)"
        )
    if index is not None and index not in range(len(groups)):
        raise ValueError(f"group = {index!r}: {label} has {len(groups)} parameter groups, the first is 0")
    return groups[index or 0]


def config_of(fields: Mapping[str, Any]) -> Config:
    """The hyperparameters of a group without its `lr`, on which no state depends."""
    return Config(**{name: fields[name] for name in FIELD_NAMES} | {"lr": fields["min_lr"]})


def check_group(group: NeutralGroup, label: str) -> None:
    """Raises a ValueError that says what is wrong with a group.

    Args:
        group: a group of unknown origin.
        label: how the message calls the group.
    """
    missing = [name for name in FIELD_NAMES if name not in group.fields]
    if missing:
        raise ValueError(f"{label} lacks {', '.join(missing)}")
    try:
        check_names(group.fields)
        check_layout(group.layout)
        config = group.config
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    lr = group.fields["lr"]
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not -math.inf < lr < math.inf:
        raise ValueError(f"{label} has lr = {lr!r}; valid: a finite number")
    step = group.step
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= MAX_STEP:
        raise ValueError(f"{label} has step = {step!r}; valid: an integer in [0, {MAX_STEP}]")
    shared = dict.fromkeys(SEARCH_SCALARS, Form((), "float32"))
    if config.clips_by_percentile:
        shared |= {"norm_history": Form((NORM_HISTORY,), "float32"), "norm_position": Form((), "int32")}
    check_forms(group.shared, shared, label)
    names = [array.name for array in group.arrays]
    doubled = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if doubled:
        raise ValueError(f"{label} has several parameters named {', '.join(doubled)}")
    for array in group.arrays:
        if not array.states:
            continue
        if array.shape is None:
            raise ValueError(f"{label} has states for {array.name} but not its shape")
        plan = state_plan(array.shape, config, group.layout, embedding=array.embedding)
        forms = state_forms(as_held(plan, array.states), group.warming)
        check_forms(array.states, forms, f"the state of {array.name}")


def in_layout(
    group: NeutralGroup, layout: Layout, axes: Axes | None, notes: Notes
) -> tuple[NeutralGroup, list[Rounded]]:
    """Converts a group to another layout (section 11.2).

    Args:
        group: a group that `check_group` accepts.
        layout: the new one.
        axes: for exceptions, permutations from the old array to the new one, by name; all others follow
            `axes_between`.
        notes: collects what is lost.

    Returns:
        The group, and the 8-bit states that were rounded again.  An array whose axes stay keeps every bit.

    Raises:
        ValueError: axes that are no permutation, or axes of an unknown parameter.
    """
    check_layout(layout)
    given = axes or {}
    unknown = sorted(set(given) - {array.name for array in group.arrays})
    if unknown:
        raise ValueError(f"axes are given for {', '.join(unknown)}, which the run does not have")
    rounding = Rounding(group.step, group.config.stochastic_rounding)
    config = group.config
    arrays, rounded = [], []
    for array in group.arrays:
        if array.shape is None:
            arrays.append(array)
            continue
        order = axes_of(array, group.layout, layout, given.get(array.name))
        shape = transposed_shape(array.shape, order)
        states = array.states
        if states:
            old = as_held(state_plan(array.shape, config, group.layout, embedding=array.embedding), states)
            new = as_held(state_plan(shape, config, layout, embedding=array.embedding), states)
            states, again = transposed_states(states, old, new, order, rounding, array.name, notes)
            rounded += again
        arrays.append(dataclasses.replace(array, shape=shape, states=states))
    tell_rounded(rounded, notes)
    return dataclasses.replace(group, layout=layout, arrays=tuple(arrays)), rounded


def axes_of(array: NeutralArray, old: Layout, new: Layout, given: Sequence[int] | None) -> tuple[int, ...]:
    """The permutation of one array of known shape: the one given by hand, or that of its layouts."""
    assert array.shape is not None
    if given is not None:
        return check_axes(given, len(array.shape), array.name)
    return axes_between(len(array.shape), old, new, embedding=array.embedding)


def tell_rounded(rounded: Sequence[Rounded], notes: Notes) -> None:
    """One sentence for each state, with the relative error of every array."""
    for state in dict.fromkeys(entry.state for entry in rounded):
        errors = sorted(((entry.error, entry.array) for entry in rounded if entry.state == state), reverse=True)
        listed = ", ".join(f"{array} {100 * error:.2f} %" for error, array in errors)
        notes.lost(f"8-bit {state} is transposed and rounded again, since its blocks change; relative error: {listed}")
