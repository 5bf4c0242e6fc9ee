"""Finds the optimizer that takes a state over, and puts the state into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from automagic_torch.optimizer import AutomagicCameAMP8bit
from automagic_torch.watching.own_optimizer import is_own, own_optimizer


def inner_optimizer(optimizer: Any) -> AutomagicCameAMP8bit:
    """The `AutomagicCameAMP8bit` itself, out of every wrapper.

    Raises:
        TypeError: there is none.
    """
    found = own_optimizer(optimizer)
    # Lightning's wrappers have the class of what they wrap, and would keep a new state to themselves.
    while is_own(within := getattr(found, "_optimizer", None)):
        found = within
    return found  # type: ignore[no-any-return]


def put_into(optimizer: AutomagicCameAMP8bit, states: Mapping[Any, Any], groups: list[dict[str, Any]]) -> None:
    """Replaces all states and groups.  The list of groups stays the same object, since timm's Lookahead holds it."""
    held = optimizer.param_groups
    optimizer.__setstate__({"state": defaultdict(dict, states), "param_groups": groups})
    held[:] = optimizer.param_groups
    optimizer.param_groups = held
