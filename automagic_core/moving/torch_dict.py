"""Converts PyTorch's state dict to the neutral form and back, without importing PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from automagic_core.arrays.group_keys import (
    LAYOUT,
    OWN_KEYS,
    STEP,
    fields_of,
    foreign_entries,
    group_key,
    missing_names,
    with_own_keys,
)
from automagic_core.arrays.state_forms import SHARED_STATES, WARM_UP_ONLY, own_states
from automagic_core.moving.earlier import as_now
from automagic_core.moving.neutral import NeutralArray, NeutralGroup


def neutral_groups(state_dict: Mapping[str, Any]) -> list[NeutralGroup]:
    """Converts ``optimizer.state_dict()``.  A state dict knows no marks, so no array has one.

    After the warm-up the states that only the warm-up needs are left out, and always what others keep in an array's
    state, since its meaning is not known.  A parameter that is listed twice has states where it stands first.
    `check_group` checks states, not this.

    Raises:
        ValueError: something is missing, or there are states of unknown parameters; the message says what.
    """
    for name in ("state", "param_groups"):
        if name not in state_dict:
            raise ValueError(f"the state dict has no {name!r}")
    groups, saved_states = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, (list, tuple)) or not isinstance(saved_states, Mapping):
        found_types = f"a {type(saved_states).__name__} as 'state' and a {type(groups).__name__} as 'param_groups'"
        raise ValueError(f"the state dict has {found_types}; valid: a dict and a list")
    states = dict(saved_states)
    several = len(groups) > 1
    found = []
    for index, group in enumerate(groups):
        label = f"the state dict's parameter group {index}" if several else "the state dict's parameter group"
        if not isinstance(group, Mapping):
            raise ValueError(f"{label} is a {type(group).__name__}; valid: a dict")
        group = with_own_keys(group)
        if missing := missing_names(group):
            raise ValueError(f"{label} lacks {', '.join(missing)}")
        _check_parameters(group, label)
        found.append(as_now(_group(group, states)))
    if states:
        raise ValueError(f"the state dict has states for unknown parameters: {sorted(states, key=str)}")
    return found


def _check_parameters(group: Mapping[str, Any], label: str) -> None:
    params, names = group["params"], group.get("param_names")
    if not isinstance(params, (list, tuple)) or not all(isinstance(key, (int, str)) for key in params):
        raise ValueError(f"{label} has params = {params!r}; valid: a list of numbers or names")
    if names is not None and (not isinstance(names, (list, tuple)) or len(names) != len(params)):
        raise ValueError(f"{label} has param_names = {names!r}; valid: one for each of its {len(params)} parameters")


def _group(group: Mapping[str, Any], states: dict[Any, Any]) -> NeutralGroup:
    """Converts one group and removes its states from `states`."""
    names = group.get("param_names")
    step, warmup_steps = group[STEP], group[group_key("warmup_steps")]
    over = isinstance(step, int) and isinstance(warmup_steps, int) and step >= warmup_steps
    arrays = []
    for index, key in enumerate(group["params"]):
        name = str(names[index] if names is not None else index)
        saved = states.pop(key, {})
        if not isinstance(saved, Mapping) or not all(isinstance(state, str) for state in saved):
            raise ValueError(f"the state of {name} is no dict of tensors by name")
        held = {
            state: as_numpy(value, f"{state} of {name}")
            for state, value in own_states(saved).items()
            if not (over and state in WARM_UP_ONLY)
        }
        shape = tuple(held["exp_avg"].shape) if "exp_avg" in held else None
        arrays.append(NeutralArray(name, shape, False, False, held))
    return NeutralGroup(
        fields={name: plain(value) for name, value in fields_of(group).items()},
        layout=group[LAYOUT],
        step=group[STEP],
        shared={name: as_numpy(group[OWN_KEYS[name]], name) for name in SHARED_STATES if OWN_KEYS[name] in group},
        arrays=tuple(arrays),
        named=names is not None,
        others={name: plain(value) for name, value in foreign_entries(group).items() if name != "betas"},
    )


def state_dict_of(groups: Sequence[NeutralGroup], tensor: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """A state dict for ``optimizer.load_state_dict``, which takes parameters by their position.

    Args:
        groups: the groups, and the arrays in each, in the order of the optimizer.
        tensor: makes a tensor from an array.
    """
    param_groups: list[dict[str, Any]] = []
    states: dict[int, dict[str, Any]] = {}
    count = 0
    for group in groups:
        keys = list(range(count, count + len(group.arrays)))
        count += len(keys)
        for key, array in zip(keys, group.arrays, strict=True):
            if array.states:
                states[key] = {name: tensor(value) for name, value in array.states.items()}
        param_groups.append(
            {
                "betas": group.fields["betas"],
                **group.others,
                **{group_key(name): value for name, value in group.fields.items()},
                LAYOUT: group.layout,
                STEP: group.step,
                **{group_key(name): tensor(value) for name, value in group.shared.items()},
                "params": keys,
                **({"param_names": [array.name for array in group.arrays]} if group.named else {}),
            }
        )
    return {"state": states, "param_groups": param_groups}


def as_numpy(value: Any, what: str) -> np.ndarray:
    """Copies a tensor of any device, or anything that is an array, to numpy.

    Raises:
        ValueError: a dtype that numpy does not know, or no values.
    """
    try:
        return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except TypeError as error:
        raise ValueError(f"{what} has a dtype that no state has: {getattr(value, 'dtype', type(value))}") from error
    except NotImplementedError as error:
        raise ValueError(f"{what} has no values: {error}") from error


def plain(value: Any) -> Any:
    """The number in an array of no dimensions, also in a tuple or list; anything else as it is."""
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
