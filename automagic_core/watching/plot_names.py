"""Names that fit on a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

LONGEST = 40
"""Characters of a run's name in the legend."""


def short_names(paths: Sequence[str]) -> list[str]:
    """For each path the fewest last parts that tell it from the others, cut in the middle where they are long.

    A path that is given twice, or that is told apart only by what the cut takes away, gets a number.
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
    """The name, without its middle where it is too long."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"
