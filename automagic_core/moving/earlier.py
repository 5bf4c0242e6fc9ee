"""Brings a run that an earlier version saved into today's neutral form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from automagic_core.arrays.group_keys import with_later_fields
from automagic_core.arrays.state_forms import SEARCH_SCALARS, as_held
from automagic_core.arrays.state_plan import state_plan
from automagic_core.moving.earlier_forms import in_todays_form
from automagic_core.moving.neutral import NeutralArray, NeutralGroup

_CLIMBED = np.full((), -1.0, np.float32)


def as_now(group: NeutralGroup) -> NeutralGroup:
    """The group in today's form; what fits no version stays as it is."""
    group = _with_search(group)
    try:
        config = group.config
    except (KeyError, ValueError):
        return group

    def with_forms(array: NeutralArray) -> NeutralArray:
        states: Mapping[str, np.ndarray] = array.states
        if states and array.shape is not None:
            # A PyTorch state dict knows no embeddings; the shapes of the states say which axis the rows are.
            for embedding in (array.embedding, True):
                plan = state_plan(array.shape, config, group.layout, embedding=embedding)
                states = in_todays_form(states, as_held(plan, states), config, group.warming)
        return dataclasses.replace(array, states=states)

    return dataclasses.replace(group, arrays=tuple(map(with_forms, group.arrays)))


def _with_search(group: NeutralGroup) -> NeutralGroup:
    """The group with what the search of version 0.1.0 had not: its fields, its scalars and every array's `walk`.

    A run in the midst of its search goes on with the rate found so far.  It has climbed and begins its walk here.
    """
    if SEARCH_SCALARS[-1] in group.shared:
        return group
    shared = dict(group.shared)
    scale = shared.pop("lr_scale", None)
    shared |= {} if scale is None else {"log_rate_scale": scale}
    shared = dict.fromkeys(SEARCH_SCALARS, np.zeros((), np.float32)) | {"peak_agreement": _CLIMBED} | shared
    group = dataclasses.replace(group, fields=with_later_fields(group.fields), shared=shared)
    return dataclasses.replace(group, arrays=tuple(_with_walk(array, group) for array in group.arrays))


def _with_walk(array: NeutralArray, group: NeutralGroup) -> NeutralArray:
    if not array.states or array.shape is None or not group.warming or not group.config.searches:
        return array
    # A PyTorch state dict knows no embeddings, so the rows are those of `lr_mask`: that version searched only with it.
    mask = array.states.get("lr_mask")
    rows = state_plan(array.shape, group.config, group.layout).row_shape if mask is None else mask.shape
    states: Mapping[str, np.ndarray] = {"walk": np.zeros(rows, np.float32), **array.states}
    return dataclasses.replace(array, states=states)
