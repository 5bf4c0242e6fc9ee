"""The keys of this optimizer in PyTorch's parameter groups (docs/algorithm.md, section 6.1).

A parameter group is a dict that many write into: ``OneCycleLR`` has a `max_lr` there, timm's schedulers an `lr_scale`.
So what the optimizer keeps there has a prefix, except `lr` and `weight_decay`, which schedulers set on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automagic_core.arrays.state_forms import SEARCH_SCALARS, SHARED_STATES
from automagic_core.config.config import FIELD_NAMES, Config

PREFIX = "automagic_"
PLAIN = ("lr", "weight_decay")
"""The fields that are read without a prefix."""
EFFECTIVE_LR = "effective_lr"
"""η̂ of the last step, which is written and never read."""


def group_key(name: str) -> str:
    """The key of a field, of `layout`, of `step` or of a state in `SHARED_STATES`."""
    return name if name in PLAIN else PREFIX + name


LAYOUT, STEP = map(group_key, ("layout", "step"))
SEARCH_KEYS = tuple(map(group_key, SEARCH_SCALARS))
LOG_RATE_SCALE, WALK_ENERGY, AGREEMENT, PEAK_AGREEMENT, FIRST_NORM, GRADIENT_NORM = SEARCH_KEYS
"""What a group holds for its rate search."""
OWN_KEYS: Mapping[str, str] = {name: group_key(name) for name in (*FIELD_NAMES, "layout", "step", *SHARED_STATES)}
"""The key of everything that the optimizer keeps in a group, by its name."""
_EXPECTED = ("params", *FIELD_NAMES, "layout", "step", "log_rate_scale")


class ParameterGroup(dict[str, Any]):
    """A parameter group in which a field can also be read by its plain name, as ``group["max_lr"]``.

    There is no such entry, so nobody takes it for their own: some schedulers ask for ``group.get("max_lr")``.  One that
    somebody writes is theirs and hides the field.
    """

    def __missing__(self, key: str) -> Any:
        if key in FIELD_NAMES and OWN_KEYS[key] in self:
            return self[OWN_KEYS[key]]
        raise KeyError(key)


def with_own_keys(group: Mapping[str, Any]) -> ParameterGroup:
    """A copy of a group in today's form.

    In version 0.1.0 the keys had no prefix, ℓ was called `lr_scale`, and other fields led the search.
    """
    if any(str(key).startswith(PREFIX) for key in group):
        return ParameterGroup(group)
    keys = {**OWN_KEYS, "lr_scale": LOG_RATE_SCALE}
    renamed = {keys.get(key, key): value for key, value in with_later_fields(group).items()}
    return ParameterGroup(renamed | ({"betas": group["betas"]} if "betas" in group else {}))


def with_later_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by name, with those that version 0.1.0 had not.

    Its search was off with the row mask, and stages 2 and 3 worked on matrices too.
    """
    if "lr_mask_gain" not in fields or "search_gain" in fields:
        return dict(fields)
    on = {name: getattr(Config, name) for name in ("search_gain", "straightness", "agreement_floor")}
    on["spatial_scope"] = "all"
    return on | ({} if fields["lr_mask_gain"] else {"search_gain": 0.0}) | dict(fields)


def missing_names(group: Mapping[str, Any]) -> list[str]:
    """The names of what every group has and this one, in today's form, lacks."""
    return [name for name in _EXPECTED if OWN_KEYS.get(name, name) not in group]


def foreign_entries(group: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a group that are somebody else's, such as a scheduler's `initial_lr`."""
    own = {*OWN_KEYS.values(), "params", "param_names", EFFECTIVE_LR}
    return {key: value for key, value in group.items() if key not in own}


def fields_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Config` in a group, by name."""
    return {name: group[OWN_KEYS[name]] for name in FIELD_NAMES}
