"""Cuts many arrays into batches (docs/algorithm.md, section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def evenly(several: Sequence[Item], most: int) -> list[list[Item]]:
    """Cuts a sequence into as few parts as there can be of at most so many; all but the last are equally long.

    What a compiler makes for one batch then serves the others.
    """
    each = -(-len(several) // -(-len(several) // most))
    return [list(several[start : start + each]) for start in range(0, len(several), each)]
