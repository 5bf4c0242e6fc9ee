"""Tables and numbers as the report prints them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.evidence.statistics import Summary

MISSING = "—"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table with its first `left` columns to the left and the others to the right."""
    lines = [headings, ["---"] * left + ["--:"] * (len(headings) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float, digits: int = 4) -> str:
    """Fixed digits; a run that diverged is called so."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "diverged"


def spread(found: Summary | None, digits: int = 4) -> str:
    """mean ± spread."""
    if found is None:
        return MISSING
    if not math.isfinite(found.mean):
        return "diverged"
    return f"{found.mean:.{digits}f} ± {found.spread:.{digits}f}"


def signed(found: Summary | None, digits: int = 4) -> str:
    """A difference, mean ± spread, with its sign."""
    if found is None:
        return MISSING
    if not math.isfinite(found.mean):
        return "diverged"
    return f"{found.mean:+.{digits}f} ± {found.spread:.{digits}f}"


def percent(value: float, digits: int = 2) -> str:
    """A share of one, in percent with its sign."""
    return f"{100 * value:+.{digits}f} %" if math.isfinite(value) else "diverged"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
