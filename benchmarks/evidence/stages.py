"""The report's part on the gradient stages: what each does to what it is for, and to the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.evidence import markdown
from benchmarks.evidence.jobs import JOBS
from benchmarks.evidence.markdown import MISSING
from benchmarks.evidence.results import Results
from benchmarks.evidence.statistics import Summary, differences, summary
from benchmarks.evidence.variants import STRONG, STRONGER

ON = "balanced"
WHITE_NOISE_SHARE = 1 - math.pi * 0.3**2
"""Of the unit square of frequencies, what lies outside the circle of radius 0.3."""
WHITE_NOISE_EDGES = math.sqrt(1 + 1 + 1 + 1 + 4**2)
"""A normal variable times the norm of the stencil (1, 1, 1, 1, −4)."""


class Measure(NamedTuple):
    """A figure of `measures.measures` that a stage is meant to lower."""

    name: str
    title: str
    digits: int


MEASURES: dict[str, tuple[Measure, ...]] = {
    "edges": (
        Measure("edge_factors", "edge strength of A and B", 3),
        Measure("edge_product", "edge strength of BA", 3),
    ),
    "frequency": (
        Measure("frequency_factors", "share above the cutoff, A and B", 4),
        Measure("frequency_product", "share above the cutoff, BA", 4),
    ),
    "low-rank": (Measure("effective_rank", "effective rank of BA", 2),),
}


def off(stage: str) -> str:
    """The variant without the stage."""
    return f"balanced-no-{stage}"


def strong(stage: str) -> str:
    """The variant with the stage far stronger."""
    return f"balanced-{stage}{STRONG}"


def measured(results: Results, job: str, variant: str, measure: Measure) -> Summary | None:
    """Over the seeds, at the rate of `balanced`; None where nothing ran."""
    rate = results.rate(job, ON)
    found = {} if rate is None else results.measured(job, variant, measure.name, rate)
    return summary(list(found.values())) if found else None


def effect_table(results: Results, jobs: Sequence[str], stage: str) -> str:
    """One row a job and measure: without the stage, with it, and with it at its stronger setting."""
    rows = []
    for job in jobs:
        for measure in MEASURES[stage]:
            cells = [measured(results, job, variant, measure) for variant in (off(stage), ON, strong(stage))]
            rows.append([JOBS[job].title, measure.title, *(markdown.spread(cell, measure.digits) for cell in cells)])
        losses = [_loss_change(results, job, variant, off(stage)) for variant in (ON, strong(stage))]
        rows.append([JOBS[job].title, "loss, against the run without", MISSING, *(map(markdown.signed, losses))])
    fields = ", ".join(f"`{name}` {value}" for name, value in STRONGER[stage].items())
    return markdown.table(["job", "measure", "off", "on", fields], rows)


def effects(results: Results, jobs: Sequence[str], stage: str) -> Iterator[str]:
    """A sentence a job: what the stage does to its measures and to the loss, as far as it exceeds the spread."""
    for job in jobs:
        rate = results.rate(job, ON)
        loss = _loss_change(results, job, ON, off(stage))
        if rate is None or loss is None:
            continue
        parts = []
        for measure in MEASURES[stage]:
            with_it, without = (results.measured(job, name, measure.name, rate) for name in (ON, off(stage)))
            changes = summary(differences(with_it, without)) if with_it.keys() & without.keys() else None
            if changes is not None:
                parts.append(f"{measure.title} {_direction(changes, measure.digits)}")
        parts.append(f"the loss {_direction(loss, 4)}")
        yield f"{JOBS[job].title}: {markdown.listed(parts)}."


def clipping(results: Results, jobs: Sequence[str]) -> Iterator[str]:
    """A sentence a job on percentile clipping, each side at its own best rate."""
    for job in jobs:
        with_it, without = (results.losses_by_seed(job, name) for name in ("balanced-percentile-95", ON))
        if with_it.keys() & without.keys():
            change = summary(differences(with_it, without))
            yield f"{JOBS[job].title}: with percentile clipping at 95 the loss {_direction(change, 4)}."


def _loss_change(results: Results, job: str, variant: str, against: str) -> Summary | None:
    rate = results.rate(job, ON)
    if rate is None:
        return None
    found = differences(*(results.losses_by_seed(job, name, rate) for name in (variant, against)))
    return summary(found) if found else None


def _direction(change: Summary, digits: int) -> str:
    """What a paired difference says in words."""
    if not math.isfinite(change.mean):
        return "cannot be compared, since a run diverged"
    amount = f"{change.mean:+.{digits}f} ± {change.spread:.{digits}f}"
    if change.seeds < 2 or abs(change.mean) <= change.spread:
        return f"does not change by more than the spread ({amount})"
    return f"{'falls' if change.mean < 0 else 'rises'} ({amount})"
