"""Shortens names of runs and parameters for plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

LONGEST = 40
"""A run's name in the legend has at most this many characters."""


def short_names(paths: Sequence[str]) -> list[str]:
    """For each path, the fewest last parts that distinguish it from the others, shortened in the middle.

    Names that are then equal get numbers.
    """
    parts = [PurePath(path).parts for path in paths]
    names: list[str] = []
    for own in parts:
        others = [other for other in parts if other != own]
        count = 1
        while count < len(own) and any(other[-count:] == own[-count:] for other in others):
            count += 1
        names.append(shortened("/".join(own[-count:]), LONGEST))
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def shortened(name: str, longest: int) -> str:
    """The name; its middle is left out if it is too long."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"
