"""Puts a state that was taken over into an optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from automagic_torch.optimizer import AutomagicCameAMP8bit


def put_into(optimizer: AutomagicCameAMP8bit, states: Mapping[Any, Any], groups: list[dict[str, Any]]) -> None:
    """Replaces all states and groups.  The list of groups stays the same object, since timm's Lookahead holds it."""
    held = optimizer.param_groups
    optimizer.__setstate__({"state": defaultdict(dict, states), "param_groups": groups})
    held[:] = optimizer.param_groups
    optimizer.param_groups = held
