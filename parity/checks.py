"""What a parity suite finds: figures with bounds, and tables of figures without."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Check:
    """One measured figure and the bound that it must keep.

    Attributes:
        suite: the part of the report.
        name: what was measured.
        value: the figure.
        bound: the largest valid value, or the smallest where `at_least`.
    """

    suite: str
    name: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """Whether the figure keeps its bound; a figure that is not finite never does."""
        if not math.isfinite(self.value):
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass
class Report:
    """All checks of one run, with what it ran on."""

    environment: dict[str, str]
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are checks and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def write(self, folder: Path) -> None:
        """Writes report.json and report.md."""
        folder.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "passed": self.passed,
            "environment": self.environment,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "notes": self.notes,
        }
        (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "report.md").write_text(self.markdown())

    def markdown(self) -> str:
        """The report as a Markdown page."""
        lines = ["# Parity report", ""]
        lines += [f"- {name}: {value}" for name, value in self.environment.items()]
        for suite in dict.fromkeys(check.suite for check in self.checks):
            lines += ["", f"## {suite}", "", "| measured | value | bound | |", "|---|---|---|---|"]
            for check in self.checks:
                if check.suite == suite:
                    lines.append(f"| {check.name} | {show(check.value)} | {show_bound(check)} | {verdict(check)} |")
        if self.notes:
            lines += ["", "## Notes", "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"


def show(value: float) -> str:
    """A figure in four digits; a share close to 1 in as many as show what is missing."""
    if 0.999 < value < 1:
        return f"{value:.7f}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def show_bound(check: Check) -> str:
    """The bound with its direction."""
    digits = f"{check.bound:.6g}"
    return f"{'≥' if check.at_least else '≤'} {digits}"


def verdict(check: Check) -> str:
    """One word."""
    return "ok" if check.passed else "EXCEEDED"


def distance(a: Any, b: Any, floor: float = 0.0) -> float:
    """‖a − b‖ / ‖b‖, formed in float64; ‖a‖ where b is all zeros.

    Args:
        a, b: arrays of one shape.
        floor: ‖b‖ counts as at least that of an array which is `floor` everywhere.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norm = max(float(np.linalg.norm(b)), floor * float(np.sqrt(b.size)))
    return float(np.linalg.norm(a - b)) / norm if norm > 0 else float(np.linalg.norm(a))
