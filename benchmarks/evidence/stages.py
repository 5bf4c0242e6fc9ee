"""The report's part on the gradient stages: what each does to what it is for, and to the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.evidence import markdown
from benchmarks.evidence.jobs import JOBS
from benchmarks.evidence.markdown import MISSING
from benchmarks.evidence.results import Results
from benchmarks.evidence.statistics import Summary, differences, summary
from benchmarks.evidence.variants import SEEDS, STRONG, STRONGER

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
        Measure("frequency_factors", "energy above the cutoff of A and B", 4),
        Measure("frequency_product", "energy above the cutoff of BA", 4),
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
    """Over `SEEDS`, at the rate of `balanced`; None where nothing ran."""
    rate = results.rate(job, ON)
    found = {} if rate is None else results.measured(job, variant, measure.name, rate)
    # The cheapest job has `balanced` runs of further seeds, which the others of a row lack.
    chosen = [value for seed, value in found.items() if seed in SEEDS]
    return summary(chosen) if chosen else None


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
    return markdown.table(["job", "measure", "off", "on", fields], rows, left=2)


def effects(results: Results, jobs: Sequence[str], stage: str) -> Iterator[str]:
    """A sentence a measure, and one on the loss: on which jobs the stage changes it by more than the spread."""
    measures = [(measure.title, measure.name) for measure in MEASURES[stage]]
    for title, name in measures:
        by_job = {}
        for job in jobs:
            rate = results.rate(job, ON)
            pairs = [] if rate is None else [results.measured(job, v, name, rate) for v in (ON, off(stage))]
            by_job[job] = _change(*pairs) if pairs else None
        yield from _told(title, by_job)
    yield from _told("loss", {job: _loss_change(results, job, ON, off(stage)) for job in jobs})


def clipping(results: Results, jobs: Sequence[str]) -> Iterator[str]:
    """A sentence on percentile clipping, with and without each at its own best rate."""
    by_job = {
        job: _change(*(results.losses_by_seed(job, name) for name in ("balanced-percentile-95", ON))) for job in jobs
    }
    yield from _told("loss", by_job)


def _told(what: str, by_job: Mapping[str, Summary | None]) -> Iterator[str]:
    """On which jobs something falls, rises or stays, in one sentence."""
    known = {JOBS[job].name: change for job, change in by_job.items() if change is not None}
    groups: dict[str, list[str]] = {}
    for job, change in known.items():
        groups.setdefault(direction(change), []).append(job)
    if groups:
        said = "; ".join(f"{words} on {markdown.listed(names)}" for words, names in groups.items())
        yield f"With it the {what} {said}."


def direction(change: Summary) -> str:
    """What the difference of the runs with a stage and without it, seed by seed, says in words."""
    if not math.isfinite(change.mean):
        return "cannot be compared, since a run diverged,"
    if change.seeds < 2 or abs(change.mean) <= change.spread:
        return "does not change by more than the spread"
    return "is lower" if change.mean < 0 else "is higher"


def _change(with_it: Mapping[int, float], without: Mapping[int, float]) -> Summary | None:
    found = differences(with_it, without)
    return summary(found) if found else None


def _loss_change(results: Results, job: str, variant: str, against: str) -> Summary | None:
    rate = results.rate(job, ON)
    if rate is None:
        return None
    return _change(*(results.losses_by_seed(job, name, rate) for name in (variant, against)))
