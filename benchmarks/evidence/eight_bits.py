"""The report's part on 8-bit states against 32-bit ones: what the rounding costs, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.evidence import markdown
from benchmarks.evidence.jobs import JOBS
from benchmarks.evidence.markdown import MISSING
from benchmarks.evidence.results import Results
from benchmarks.evidence.statistics import differences, interval, summary
from benchmarks.evidence.variants import PAIRED_SEEDS, PROFILES, START, THIRTY_TWO

BOUNDS = {"memory_optimized": 0.015, "balanced": 0.01, "quality_optimized": 0.01}
"""What the upper end of the interval should stay below, of the 32-bit loss."""
FEWEST = 8
"""Seeds from which an interval is given."""


def paired(results: Results, job: str, profile: str) -> list[float]:
    """(8-bit − 32-bit) / 32-bit of the final loss, one a seed, both from the same start."""
    names = (profile, profile + THIRTY_TWO)
    eight, thirty_two = (results.losses_by_seed(job, name, START, seeds=PAIRED_SEEDS) for name in names)
    return differences(eight, thirty_two, relative=True)


def paired_table(results: Results, jobs: Sequence[str]) -> str:
    """One row a job and profile with runs: seeds, mean, spread, interval, bound, and whether it is kept."""
    rows = []
    for job in jobs:
        for profile in PROFILES:
            found = paired(results, job, profile)
            if not found:
                continue
            row = [JOBS[job].title, f"`{profile}`", str(len(found))]
            over = summary(found)
            row += [markdown.percent(over.mean), f"{100 * over.spread:.2f} %" if over.seeds > 1 else MISSING]
            if over.seeds < FEWEST or not math.isfinite(over.mean):
                rows.append([*row, MISSING, MISSING])
                continue
            ends = interval(found)
            verdict = "yes" if ends.high < BOUNDS[profile] else "**no**"
            row += [f"{markdown.percent(ends.low)} … {markdown.percent(ends.high)}"]
            rows.append([*row, f"below {100 * BOUNDS[profile]:.1f} %: {verdict}"])
    return markdown.table(["job", "profile", "seeds", "mean", "spread", "95 % interval", "upper end"], rows, left=2)
