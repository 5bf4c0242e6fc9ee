"""Finds the optimizer of this package in what a report was given."""

from __future__ import annotations

from typing import Any

from automagic_core.arrays.group_keys import STEP

_WRAPPED = ("optimizer", "_optimizer", "_base_optimizer")
"""Where Accelerate, Lightning and timm's Lookahead keep the optimizer that they wrap."""


def is_own(optimizer: Any) -> bool:
    """Whether this is an `AutomagicCameAMP8bit`, which the reports cannot import."""
    groups = getattr(optimizer, "param_groups", ())
    return hasattr(optimizer, "_stage_energy") and all(STEP in group for group in groups)


def own_optimizer(optimizer: Any) -> Any:
    """The `AutomagicCameAMP8bit` itself, also out of a wrapper.

    Raises:
        TypeError: there is none.
    """
    seen, found = set(), optimizer
    while not is_own(found):
        seen.add(id(found))
        inner = [getattr(found, name, None) for name in _WRAPPED]
        found = next((x for x in inner if x is not None and id(x) not in seen), None)
        if found is None:
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; valid: an AutomagicCameAMP8bit")
    # Some wrappers hand everything on, and those of Lightning have the class and the attributes of what they wrap.
    while (within := next((x for name in _WRAPPED if is_own(x := getattr(found, name, None))), None)) is not None:
        found = within
    return found
